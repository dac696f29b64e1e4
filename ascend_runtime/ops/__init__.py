"""Operators with one signature each, whatever the device; the only place that knows what a device does best.

`PlainOperators` are torch's own (CPU and CUDA); `AscendOperators` are those of an NPU.
"""

from __future__ import annotations

import os

import torch

from ..specs import OperatorSpec
from .plain import PlainOperators

VARIABLE = "ASCEND_RUNTIME_OPERATORS"
WAYS = ("auto", "npu", "torch")


def operators_for(device: torch.device, spec: OperatorSpec, dtype: torch.dtype) -> PlainOperators:
    """The operators for tensors on `device` in `dtype`, as `spec` (every choice in it made) asks.

    The variable ASCEND_RUNTIME_OPERATORS overrides the device: "torch" takes torch's own on an NPU, to find out
    whether a fused operator is at fault; "npu" takes an NPU's elsewhere, which only a stand-in for them survives.

    Raises ValueError for what the device, the dtype or the installed libraries cannot do.
    """
    if _way(device) == "npu":
        from .ascend import AscendOperators  # what it needs is not on every machine

        return AscendOperators(device, spec, dtype)
    return PlainOperators(spec)


def check_quantized(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where linears with weights and activations in 8 bits (W8A8) are not computed on `device`, or
    not in this dtype of the blocks."""
    if _way(device) == "npu":
        from . import ascend

        ascend.check_quantized(device, dtype)
    elif device.type == "npu":
        raise ValueError(f"{VARIABLE} is 'torch', which has no W8A8 linears on an NPU. Unset it, or quantize nothing.")


def _way(device: torch.device) -> str:
    way = os.environ.get(VARIABLE) or "auto"
    if way not in WAYS:
        raise ValueError(f"{VARIABLE} is {way!r}; it can be one of {', '.join(WAYS)}. Unset it for the device's own.")
    if way == "auto":
        return "npu" if device.type == "npu" else "torch"
    return way


__all__ = ["PlainOperators", "check_quantized", "operators_for"]
