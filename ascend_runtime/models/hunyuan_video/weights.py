"""How the HunyuanVideo transformer's parameters are kept: dtype, tensor-parallel dim, quantization."""

from __future__ import annotations

from ..family import WeightRules
from .files.configs import DOUBLE, SINGLE

# How tensor parallelism cuts a block's layers: column-parallel ones (whole heads, or a part of the feed-forward's
# width) with their biases; row-parallel ones, whose bias is replicated. Norms of query and key are per head.
CUT_BY_COLUMNS = (
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "ff.net.0.proj", "ff_context.net.0.proj",
    "proj_mlp",
)  # fmt: skip
CUT_BY_ROWS = ("to_out.0", "to_add_out", "ff.net.2", "ff_context.net.2", "proj_out_attn", "proj_out_mlp")
# Of a quantized layer: what is not cut, and what has the outputs last, as each step may have its own.
UNCUT, OUTPUTS_LAST = ("input_scale", "input_offset"), ("deq_scale", "quant_bias")
# The layers of a block that are quantized on the fly: all but those that read a feed-forward's inner activations, which
# have large outliers, as for Wan.
IN_8_BITS = (*CUT_BY_COLUMNS, "to_out.0", "to_add_out", "proj_out_attn")


def in_blocks(name: str) -> bool:
    return name.startswith((DOUBLE, SINGLE))


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: it is replicated."""
    layer, _, kind = name.rpartition(".")
    if not in_blocks(name):
        return None
    if layer.endswith(CUT_BY_COLUMNS):
        return None if kind in (*UNCUT, "mul_scale") else -1 if kind in OUTPUTS_LAST else 0
    return {"weight": 1, "weight_scale": 1, "mul_scale": 0}.get(kind) if layer.endswith(CUT_BY_ROWS) else None


def kept_in_8_bits(layer: str) -> bool:
    """Whether a layer is quantized when a model is quantized on the fly."""
    return in_blocks(layer) and layer.endswith(IN_8_BITS)


RULES = WeightRules(cut_dim=cut_dim, in_8_bits=kept_in_8_bits)
