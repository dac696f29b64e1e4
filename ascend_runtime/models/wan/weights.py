"""How the Wan transformer's parameters are kept: dtype, tensor-parallel dim, quantization."""

from __future__ import annotations

from ..cuts import cut_of
from ..family import WeightRules

# Kept in fp32 whatever the dtype of the blocks, like in diffusers: they are small, and every step depends on them.
FP32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
# How tensor parallelism cuts a block's layers: column-parallel ones (whole heads, or a part of the feed-forward's
# width) with their biases and the norms of query and key; row-parallel ones, whose bias is replicated. Others are not
# cut.
CUT_BY_COLUMNS = (
    "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "norm_q", "norm_k", "norm_added_k"
)  # fmt: skip
CUT_BY_ROWS = ("to_out.0", "ffn.net.2")
# The layers of a block that are quantized on the fly: all but ffn.net.2, whose inputs have large outliers, and which
# msModelSlim's recipes for Wan leave out as well.
IN_8_BITS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0", "ffn.net.0.proj")


def keeps_fp32(name: str) -> bool:
    """Whether a parameter is kept in fp32 whatever the dtype of the blocks."""
    return any(part in name for part in FP32_PARAMETERS)


def replicated(name: str) -> bool:
    """Whether every rank keeps a parameter whole under FSDP: the fp32 parameters of units with the blocks' dtype, since
    FSDP gathers one dtype at a time."""
    return keeps_fp32(name) and "time_embedder" not in name


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: it is replicated."""
    return cut_of(name, CUT_BY_COLUMNS, CUT_BY_ROWS) if name.startswith("blocks.") else None


def kept_in_8_bits(layer: str) -> bool:
    """Whether a layer is quantized when a model is quantized on the fly."""
    return layer.startswith("blocks.") and layer.endswith(IN_8_BITS)


RULES = WeightRules(fp32=keeps_fp32, replicated=replicated, cut_dim=cut_dim, in_8_bits=kept_in_8_bits)
