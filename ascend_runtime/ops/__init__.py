"""Operators with the same signatures on every device; the only module that chooses a device's best implementation.

`PlainOperators` are torch's own (CPU and CUDA); `AscendOperators` are an NPU's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import coded_error
from ..specs import OperatorSpec
from .plain import PlainOperators

OPERATORS_VARIABLE = "ASCEND_RUNTIME_OPERATORS"
OPERATOR_SETS = ("auto", "npu", "torch")
LAYOUT_VARIABLE, LAYOUTS = "ASCEND_RUNTIME_WEIGHT_LAYOUT", ("auto", "torch")


def operators_for(device: torch.device, spec: OperatorSpec, dtype: torch.dtype) -> PlainOperators:
    """The operators for tensors on `device` in `dtype`, by a `spec` without "auto" values.

    The variable ASCEND_RUNTIME_OPERATORS overrides the device: "torch" uses torch's own operators on an NPU, to check
    whether a fused operator causes a problem; "npu" uses an NPU's operators on another device, which works only with
    substitutes for them.

    Raises ValueError for what the device, the dtype or the installed libraries do not support.
    """
    if way_of(device) == "npu":
        from .ascend import AscendOperators  # its libraries are not installed on every machine

        return AscendOperators(device, spec, dtype)
    return PlainOperators(spec)


def check_quantized(device: torch.device, dtype: torch.dtype, formats: Iterable[str]) -> None:
    """Raises ValueError if `device` does not support linear layers in these formats of msModelSlim ("W8A8_DYNAMIC",
    ...), or not in this dtype of the blocks."""
    _choice(LAYOUT_VARIABLE, LAYOUTS)
    if way_of(device) == "npu":
        from . import ascend

        ascend.check_card_quantized(device, dtype, formats)
    elif device.type == "npu":
        raise coded_error(
            "AV-1407",
            f"{OPERATORS_VARIABLE} is 'torch', which has no quantized linear layers on an NPU. Unset it, or do not "
            "quantize.",
        )


def in_preferred_layout(weight: Tensor) -> Tensor:
    """An int8 weight [N, K] of a quantized layer, in the layout that its device's operator prefers; it must not be
    written to afterwards. The variable ASCEND_RUNTIME_WEIGHT_LAYOUT keeps torch's own layout if it is "torch"."""
    if _choice(LAYOUT_VARIABLE, LAYOUTS) == "torch" or way_of(weight.device) != "npu":
        return weight
    from . import ascend

    return ascend.in_fractal_nz(weight)


def way_of(device: torch.device) -> str:
    """Whose operators compute on `device`, "npu" or "torch"; see `operators_for`. Raises ValueError."""
    way = _choice(OPERATORS_VARIABLE, OPERATOR_SETS)
    if way == "auto":
        return "npu" if device.type == "npu" else "torch"
    return way


def _choice(variable: str, values: tuple[str, ...]) -> str:
    """The value of an environment variable; the first of `values` if it is unset. Raises ValueError for another one."""
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise ValueError(f"{variable} is {value!r}; it can be one of {', '.join(values)}. Unset it for the default.")
    return value


__all__ = ["PlainOperators", "check_quantized", "in_preferred_layout", "operators_for", "way_of"]
