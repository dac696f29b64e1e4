"""Linear layers with quantized weights and dynamically quantized activations: int8 (W8A8), fp8 in groups (MXFP8), or 4
bits (W4A4).

They use a quarter of the memory of fp32 layers or less, and compute products of what their formats hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....checkpoints.msmodelslim import Layer
from ....ops import mxfp8, packing
from ....ops.blocks.rotation import rotated
from ....parallel.tensor import TensorParallel
from .base import QuantizedLinear, new_parameter


class DynamicLinear(QuantizedLinear):
    """A quantized linear layer with an int8 weight, one scale for each row, and dynamic activation quantization by
    token.

    Parameters: weight [out, in], weight_scale [out, 1] in fp32, bias [out]; mul_scale [in]. rotation: the size of the
    groups of inputs that are rotated, as the weight's are; 0: none.
    """

    def __init__(self, like: nn.Linear, layer: Layer):
        super().__init__(like, layer)
        self.rotation = layer.rotation
        self.multiple = max(self.multiple, layer.rotation)

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        self.weight_scale = new_parameter(like.out_features, 1, dtype=torch.float32)
        self.bias = None if like.bias is None else new_parameter(like.out_features, dtype=like.bias.dtype)

    def _product(self, x: Tensor) -> Tensor:
        return self.ops.quantized_linear(rotated(x, self.rotation), *self._weights(), self.bias, self.mul_scale)

    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.quantized_linear_all_reduce(self._prepared(x), *self._weights(), self.bias, tp.group)

    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.quantized_linear_part(self._prepared(x), *self._weights(), tp.group)

    def _prepared(self, x: Tensor) -> Tensor:
        return rotated(self._smoothed(x), self.rotation)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight_scale.flatten()

    def dequantized(self) -> Tensor:
        return self._unsmoothed(rotated(self.weight * self.weight_scale, self.rotation))


class Int4Linear(DynamicLinear):
    """A quantized linear layer in 4 bits. Parameters: as above, but weight [out, in / 2] (see ops/packing.py)."""

    multiple, whole, by_layout = packing.PER_INT32, True, False

    def _add_weight(self, like: nn.Linear) -> None:
        self.weight = new_parameter(like.out_features, like.in_features // packing.PER_BYTE, dtype=torch.int8)

    def _product(self, x: Tensor) -> Tensor:
        return self.ops.int4_linear(x, *self._weights(), self.bias, self.mul_scale)

    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.int4_linear_all_reduce(self._smoothed(x), *self._weights(), self.bias, tp.group)

    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.int4_linear_part(self._smoothed(x), *self._weights(), tp.group)

    def dequantized(self) -> Tensor:
        return self._unsmoothed(packing.int4_values(self.weight) * self.weight_scale)


class MxLinear(DynamicLinear):
    """A quantized linear layer in MXFP8 (see ops/mxfp8.py).

    Parameters: weight [out, in], the bits of fp8 in uint8; weight_scale [out, groups], exponents in uint8; bias [out]
    in fp32, as the operator takes it; mul_scale.
    """

    multiple, by_layout = mxfp8.MX_GROUP, False
    free = ("mul_scale",)

    def _add_weight(self, like: nn.Linear) -> None:
        self.weight = new_parameter(like.out_features, like.in_features, dtype=torch.uint8)

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        groups = mxfp8.groups_of(like.in_features)
        self.weight_scale = new_parameter(like.out_features, groups, dtype=torch.uint8)
        self.bias = None if like.bias is None else new_parameter(like.out_features, dtype=torch.float32)

    def _product(self, x: Tensor) -> Tensor:
        return self.ops.mx_linear(self._smoothed(x), *self._weights(), self.bias)

    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.mx_linear_all_reduce(self._smoothed(x), *self._weights(), self.bias, tp.group)

    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.mx_linear(self._smoothed(x), *self._weights(), None)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.weight.view(mxfp8.E4M3), self.weight_scale

    def dequantized(self) -> Tensor:
        return self._unsmoothed(mxfp8.mx_dequantized(*self._weights()))
