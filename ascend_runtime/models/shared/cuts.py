"""Along which dims tensor parallelism cuts the parameters of a linear layer, quantized or not."""

from __future__ import annotations

# Of a quantized layer: what is not cut, and what has the outputs last, as each step may have its own.
UNCUT, OUTPUTS_LAST = ("input_scale", "input_offset"), ("deq_scale", "quant_bias")


def cut_of(name: str, by_columns: tuple[str, ...], by_rows: tuple[str, ...]) -> int | None:
    """The dim along which a parameter of a block is cut; None: it is replicated.

    by_columns: the endings of the names of layers that are cut along their outputs; by_rows: along their inputs, so
    that their bias is replicated.
    """
    layer, _, kind = name.rpartition(".")
    if layer.endswith(by_columns):
        return None if kind in (*UNCUT, "mul_scale") else -1 if kind in OUTPUTS_LAST else 0
    return {"weight": 1, "weight_scale": 1, "mul_scale": 0}.get(kind) if layer.endswith(by_rows) else None
