"""How values of quantized weights are kept as bytes.

4-bit integers lie in pairs: two neighbours of a row in each byte, the first one in the lower half. Four such bytes are
an int32 as torch_npu.npu_convert_weight_to_int4pack makes it (Ascend/op-plugin,
op_plugin/ops/opapi/ConvertWeightToINT4PackKernelNpuOpApi.cpp) on processors with the lowest byte first, which all are
that work with these cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INT4_MAX, INT4_MIN = 7, -8
PER_BYTE = 2  # 4-bit integers
PER_INT32 = 8  # npu_quant_matmul takes 4-bit integers in whole int32


def int4_pairs(x: Tensor) -> Tensor:
    """int8 [..., K/2] of int8 x [..., K] within 4 bits. By operators that all devices have, which shifts are not."""
    first, second = x[..., 0::2], x[..., 1::2]
    return second * 16 + torch.where(first < 0, first + 16, first)


def int4_values(pairs: Tensor) -> Tensor:
    """The inverse of `int4_pairs`."""
    second = torch.div(pairs, 16, rounding_mode="floor")
    first = pairs - second * 16
    return torch.stack((torch.where(first > INT4_MAX, first - 16, first), second), -1).flatten(-2)


@dataclass(frozen=True)
class Packing:
    """what: the allowed values, for an error. valid: whether all values of a tensor are allowed. kept: makes the bytes.
    values: the number of neighbours of a row that a byte holds."""

    what: str
    valid: Callable[[Tensor], Tensor]
    kept: Callable[[Tensor], Tensor]
    values: int = 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the bytes, given that of the values."""
        return (*stored[:-1], -(-stored[-1] // self.values)) if stored else stored

    def stored(self, part: tuple[slice, ...]) -> tuple[slice, ...]:
        """The values that this part of the bytes holds."""
        *rows, last = part
        return *rows, slice(last.start * self.values, last.stop * self.values)

    def packed(self, tensor: Tensor) -> Tensor:
        """The bytes. Raises ValueError for values that are not allowed."""
        if not self.valid(tensor):
            raise ValueError(f"values that are not {self.what}")
        return self.kept(tensor)


PAIRS = Packing(
    "integers of 4 bits, -8 to 7", lambda x: ((x >= INT4_MIN) & (x <= INT4_MAX)).all(), int4_pairs, PER_BYTE
)
FP8_BITS = Packing("finite", lambda x: x.float().isfinite().all(), lambda x: x.view(torch.uint8))
EXPONENTS = Packing("exponents from 0 to 254", lambda x: (x < 255).all(), lambda x: x)
