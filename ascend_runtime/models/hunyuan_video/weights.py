"""How the HunyuanVideo transformer's parameters are kept: dtype, tensor-parallel dim, quantization. No parameter needs
fp32, as in diffusers: what is computed in fp32 is upcast."""

from __future__ import annotations

from ..cuts import cut_of
from ..family import WeightRules
from .files.configs import DOUBLE, SINGLE

# How tensor parallelism cuts a block's layers: column-parallel ones (whole heads, or a part of the feed-forward's
# width) with their biases; row-parallel ones, whose bias is replicated. Norms of query and key are per head.
HEADS_AND_WIDTHS = (
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "ff.net.0.proj", "ff_context.net.0.proj",
    "proj_mlp",
)  # fmt: skip
# Modulation is 27 % of the blocks' weights (6.8 GB in bfloat16) and almost no work: its outputs are gathered.
OF_MODULATION = ("norm1.linear", "norm1_context.linear", ".norm.linear")
CUT_BY_COLUMNS = (*HEADS_AND_WIDTHS, *OF_MODULATION)
CUT_BY_ROWS = ("to_out.0", "to_add_out", "ff.net.2", "ff_context.net.2", "proj_out_attn", "proj_out_mlp")
# The layers of a block that are quantized on the fly: all but modulation, and those that read a feed-forward's inner
# activations, which have large outliers, as for Wan.
IN_8_BITS = (*HEADS_AND_WIDTHS, "to_out.0", "to_add_out", "proj_out_attn")


def in_blocks(name: str) -> bool:
    return name.startswith((DOUBLE, SINGLE))


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: it is replicated."""
    return cut_of(name, CUT_BY_COLUMNS, CUT_BY_ROWS) if in_blocks(name) else None


def kept_in_8_bits(layer: str) -> bool:
    """Whether a layer is quantized when a model is quantized on the fly."""
    return in_blocks(layer) and layer.endswith(IN_8_BITS)


RULES = WeightRules(cut_dim=cut_dim, in_8_bits=kept_in_8_bits)
