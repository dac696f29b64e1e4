"""Linear layers with weights in 8 bits, and activations that are quantized to 8 bits as they come (W8A8).

A quarter of a layer's fp32 bytes, half of its bfloat16 ones, and products of whole numbers. What is quantized, and how,
a file says (checkpoints/msmodelslim.py), or a network's own rule where weights are quantized as they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...checkpoints.faults import listed
from ...checkpoints.msmodelslim import DYNAMIC, STATIC, Layer
from ...ops import PlainOperators
from ...ops.quantization import Static
from ...parallel.tensor import TensorParallel

WAYS = {"w8a8_dynamic": Layer(DYNAMIC)}  # in which a model is quantized as it is read, by what a description asks for


class QuantizedLinear(nn.Module):
    """What nn.Linear computes, with a weight in int8, a scale a row, and a scale a token that is found as it comes.

    Parameters: weight [out, in], weight_scale [out, 1] in fp32, bias [out]; mul_scale [in], by which what goes in is
    multiplied first, where outliers were moved into the weight. Built on the meta device.
    """

    ops: PlainOperators

    def __init__(self, like: nn.Linear, smoothed: bool):
        super().__init__()
        self.weight = _parameter(like.out_features, like.in_features, dtype=torch.int8)
        self.mul_scale = _parameter(like.in_features, dtype=like.weight.dtype) if smoothed else None
        self._add_scales(like)

    def _add_scales(self, like: nn.Linear) -> None:
        self.weight_scale = _parameter(like.out_features, 1, dtype=torch.float32)
        self.bias = None if like.bias is None else _parameter(like.out_features, dtype=like.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        return self.ops.quantized_linear(self._smoothed(x), self.weight, self.weight_scale.flatten(), self.bias)

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """The sum over ranks that each hold some of the inputs; x [B, S, in / ranks]."""
        x = self._smoothed(x)
        return self.ops.quantized_linear_all_reduce(x, self.weight, self.weight_scale.flatten(), self.bias, tp.group)

    def _smoothed(self, x: Tensor) -> Tensor:
        return x if self.mul_scale is None else x * self.mul_scale


class StaticLinear(QuantizedLinear):
    """The same with one scale of the input, [1] as its offset, which was measured when the model was quantized.

    Parameters: weight; input_scale, input_offset; deq_scale [out], quant_bias [out] in int32 (see Static).
    """

    def _add_scales(self, like: nn.Linear) -> None:
        self.input_scale, self.input_offset = (_parameter(1, dtype=torch.float32) for _ in range(2))
        self.deq_scale = _parameter(like.out_features, dtype=torch.float32)
        self.quant_bias = _parameter(like.out_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.static_linear(self._smoothed(x), self.weight, self._static())

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.static_linear_all_reduce(self._smoothed(x), self.weight, self._static(), tp.group)

    def _static(self) -> Static:
        return Static(self.input_scale, self.input_offset, self.deq_scale, self.quant_bias)


def quantize(network: nn.Module, layers: Mapping[str, Layer], blocks: tuple[str, ...]) -> None:
    """Puts such layers, on the meta device, into the place of those of these names; they compute with network.ops.

    blocks: what the names of layers in blocks begin with.

    Raises ValueError for names of what is no linear layer of a block.
    """
    strange = [name for name in layers if not (name.startswith(blocks) and _is_linear(network, name))]
    if strange:
        raise ValueError(
            f"What is quantized must be linear layers of this network's blocks; {listed({'are not': strange})}. Is it "
            "another model's description, or were embedders or the head quantized too?"
        )
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        kind = StaticLinear if layer.algorithm == STATIC else QuantizedLinear
        made = kind(network.get_submodule(name), layer.smoothed)
        made.ops = network.ops
        setattr(network.get_submodule(owner), leaf, made)


def _is_linear(network: nn.Module, name: str) -> bool:
    try:
        return isinstance(network.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def linears(network: nn.Module, chosen: Callable[[str], bool]) -> Iterable[str]:
    """The names of the network's linear layers of which `chosen` is true."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and chosen(name)]


def quantized_parameters(network: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes that parameters of quantized layers have whatever the blocks' dtype is, by name."""
    return {
        f"{name}.{leaf}": parameter.dtype
        for name, module in network.named_modules() if isinstance(module, QuantizedLinear)
        for leaf, parameter in module.named_parameters() if leaf not in ("bias", "mul_scale")
    }  # fmt: skip


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
