"""How the Wan transformer's parameters are held: in which dtype, cut along which dim, in how many bits."""

from __future__ import annotations

from ..family import WeightRules

# Kept in fp32 whatever the dtype of the blocks, as diffusers does: they are small, and every step depends on them.
FP32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
# How tensor parallelism cuts a block's layers: by columns, whole heads or a part of the feed-forward's width, with
# their biases and the norms of query and key; or by rows, whose bias stays whole. What is not named is not cut.
COLUMNS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "norm_q", "norm_k", "norm_added_k")
ROWS = ("to_out.0", "ffn.net.2")
UNCUT = ("input_scale", "input_offset")  # of a quantized layer
# Which layers of a block are kept in 8 bits on demand: all but the one that msModelSlim's recipes for Wan leave out as
# well, whose inputs have a few values far above all others.
IN_8_BITS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0", "ffn.net.0.proj")


def keeps_fp32(name: str) -> bool:
    """Whether a parameter is in fp32 whatever the dtype of the blocks."""
    return any(part in name for part in FP32_PARAMETERS)


def replicated(name: str) -> bool:
    """Whether every rank keeps a parameter whole under FSDP, which gathers one dtype at a time: what is in fp32 within
    a unit of the blocks' dtype."""
    return keeps_fp32(name) and "time_embedder" not in name


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: every rank has all of it."""
    layer, _, kind = name.rpartition(".")
    if not name.startswith("blocks."):
        return None
    if layer.endswith(COLUMNS):
        return None if kind in (*UNCUT, "mul_scale") else 0
    return {"weight": 1, "mul_scale": 0}.get(kind) if layer.endswith(ROWS) else None


def kept_in_8_bits(layer: str) -> bool:
    """Whether a layer is quantized where a model is to be as it is read."""
    return layer.startswith("blocks.") and layer.endswith(IN_8_BITS)


RULES = WeightRules(fp32=keeps_fp32, replicated=replicated, cut_dim=cut_dim, in_8_bits=kept_in_8_bits)
