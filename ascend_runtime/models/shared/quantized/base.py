"""The base of linear layers that keep their weights in fewer bits, with the place where LoRAs add to their products."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ....checkpoints.msmodelslim import Layer
from ....ops import PlainOperators
from ....ops.quantization import smoothed
from ....parallel.tensor import TensorParallel
from .lora import LoraTerm


class QuantizedLinear(nn.Module, ABC):
    """nn.Linear with a weight in fewer bits, built on the meta device. A kind of layer defines its parameters, its
    product with a weight on one rank and on ranks of tensor parallelism, and what its bytes stand for.

    mul_scale [in]: a factor for the input if outliers were moved into the weight; or None. lora: what LoRAs add to the
    output, of the input before that factor; None: nothing.

    multiple: tensor parallelism cuts the weight's inputs in multiples of it. whole: whether their number must be one
    too. free: the parameters that are kept in the dtype of the blocks. by_layout: whether the device's operator prefers
    a layout of the weight.
    """

    ops: PlainOperators
    multiple, whole, by_layout = 1, False, True
    free: tuple[str, ...] = ("bias", "mul_scale")

    def __init__(self, like: nn.Linear, layer: Layer):
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.has_bias = like.bias is not None
        self.lora: LoraTerm | None = None
        self.mul_scale = new_parameter(like.in_features, dtype=like.weight.dtype) if layer.smoothed else None
        self._add_weight(like)
        self._add_scales(like, layer)

    def _add_weight(self, like: nn.Linear) -> None:
        self.weight = new_parameter(like.out_features, like.in_features, dtype=torch.int8)

    @abstractmethod
    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        """Adds the other parameters, such as scales and bias."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shapes of the weight and the bias that the layer stands for."""
        weight = {"weight": (self.out_features, self.in_features)}
        return weight | {"bias": (self.out_features,)} if self.has_bias else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        out = self._product(x)
        return out if self.lora is None else self.lora.added_to(out, x)

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """The row-parallel layer, all-reduced; x [B, S, in / ranks]. With LoRAs product and all-reduce are separate."""
        if self.lora is None:
            return self._all_reduced(x, tp)
        made = self.part(x, tp)
        return self.ops.summed(made, self.added(made.dtype), tp.group)

    def part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """This rank's summand in `all_reduced`, whose sum is short of `added`."""
        out = self._part(x, tp)
        return out if self.lora is None else self.lora.added_to(out, x, with_bias=False)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the sum of the ranks' parts: the bias [out]."""
        own = self._added(dtype)
        if self.lora is None or self.lora.bias is None:
            return own
        return self.lora.bias.to(dtype) if own is None else own + self.lora.bias.to(dtype)

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weight [out, in] that the bytes stand for, in fp32, for inputs before `mul_scale`."""

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight, plus the bias: a new tensor [..., out] in x's dtype."""

    @abstractmethod
    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """The row-parallel layer, all-reduced, by one operator if there is one; x [B, S, in / ranks]."""

    @abstractmethod
    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """This rank's summand in `_all_reduced`: a new tensor [B, S, out]."""

    def _added(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the sum of the parts: the bias [out]."""
        return None if self.bias is None else self.bias.to(dtype)

    def _smoothed(self, x: Tensor) -> Tensor:
        return smoothed(x, self.mul_scale)

    def _unsmoothed(self, weight: Tensor) -> Tensor:
        """A weight [out, in] in fp32 for inputs before `mul_scale`."""
        return weight if self.mul_scale is None else weight * self.mul_scale.float()


def new_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
