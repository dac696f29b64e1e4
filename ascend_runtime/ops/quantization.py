"""Symmetric quantization to int8 with one scale for each row of a weight, or for each token; to 4 bits likewise.

    x = scale * integer,  scale = the largest magnitude of the row / 127 (in 4 bits: / 7)

Products of two quantized tensors are integers, which fit 32 bits for rows of up to 133 000 values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127
MAX_PRODUCTS = 2**26  # elements of an int32 product that are held at once: 256 MiB
CUDA_MULTIPLE, CUDA_ROWS = 8, 17  # torch._int_mm on CUDA needs widths that are multiples of 8, and at least 17 rows


def quantized_rows(x: Tensor, largest: Tensor | None = None, limit: int = INT8_MAX) -> tuple[Tensor, Tensor]:
    """(int8 with x's shape, scale [..., 1] in fp32) of x [..., K].

    largest: the largest magnitude of each whole row [..., 1], if x is a part of the rows. A row of zeros has the scale
    1. limit: the integer that the largest magnitude becomes.
    """
    if largest is None:
        largest = row_largest(x)
    scale = largest / limit
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x.to(scale.dtype) / scale).round_().to(torch.int8), scale


def smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    """x [..., K] times the factors `smooth` [K], by which a weight was divided to take over outliers; None: x."""
    return x if smooth is None else x * smooth


def row_largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row [..., 1] of x [..., K], in fp32."""
    return x.abs().amax(-1, keepdim=True).float()


class Static(NamedTuple):
    """The parameters of a layer with static activation quantization: the integers are x / input_scale + input_offset,
    and the output is (products + bias) * scale. input_scale and input_offset have one element; the others are [N]."""

    input_scale: Tensor
    input_offset: Tensor
    scale: Tensor  # the input's times the weight's
    # int32: the layer's bias in units of `scale`, minus the offset's contribution to the products; None: another layer,
    # whose output is added to this one's, has it for both.
    bias: Tensor | None

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to products that are scaled already: [N]."""
        return None if self.bias is None else (self.scale * self.bias).to(dtype)


def statically_quantized(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """x as int8, with x's shape."""
    return (x.float() / scale + offset).round_().clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8)


def scaled_products(
    rows: Tensor, row_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """rows weight^T, times the scales of both, plus the bias: [M, N] in `dtype`, computed in fp32.

    rows int8 [M, K], row_scale [M, 1] (None: 1); weight int8 [N, K], scale [N]; bias [N], added before scaling if it is
    an integer tensor, else after.
    """
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype, device=rows.device)
    count = max(1, MAX_PRODUCTS // weight.shape[0])
    whole = bias is not None and not bias.is_floating_point()
    for start in range(0, rows.shape[0], count):
        part = slice(start, start + count)
        made = _products(rows[part], weight)
        made = (made + bias if whole else made) * scale
        made = made if row_scale is None else made.mul_(row_scale[part])
        out[part] = made if bias is None or whole else made.add_(bias)
    return out


def _products(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight^T in int32."""
    if rows.device.type != "cuda":
        return torch._int_mm(rows, weight.t())
    (count, width), outputs = rows.shape, weight.shape[0]
    wide, far = (-size % CUDA_MULTIPLE for size in (width, outputs))
    rows = F.pad(rows, (0, wide, 0, max(0, CUDA_ROWS - count)))
    if wide or far:
        weight = F.pad(weight, (0, wide, 0, far))
    return torch._int_mm(rows, weight.t())[:count, :outputs]
