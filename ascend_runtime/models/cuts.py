"""Along which dims tensor parallelism cuts the parameters of a linear layer, quantized or not."""

from __future__ import annotations

from ..checkpoints.fused import OF_INPUTS, OUTPUTS_LAST


def cut_of(name: str, by_columns: tuple[str, ...], by_rows: tuple[str, ...]) -> int | None:
    """The dim along which a parameter of a block is cut; None: it is replicated.

    by_columns: the endings of the names of layers that are cut along their outputs; by_rows: along their inputs, so
    that their bias is replicated.
    """
    layer, _, kind = name.rpartition(".")
    if layer.endswith(by_columns):
        return None if kind in OF_INPUTS else -1 if kind in OUTPUTS_LAST else 0
    return {"weight": 1, "weight_scale": 1, "mul_scale": 0}.get(kind) if layer.endswith(by_rows) else None
