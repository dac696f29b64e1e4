"""Linear layers with int8 weights and activations (W8A8).

They use a quarter of the memory of fp32 layers, half of that of bfloat16 layers, and compute integer products. The
layers to quantize are listed in a file (checkpoints/msmodelslim.py), or chosen by the family's rule if weights are
quantized on the fly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...checkpoints.faults import list_faults
from ...checkpoints.msmodelslim import DYNAMIC, STATIC, Layer
from ...ops import PlainOperators
from ...ops.quantization import Static
from ...parallel.tensor import TensorParallel

QUANTIZATION_SCHEMES = {"w8a8_dynamic": Layer(DYNAMIC)}  # for weights that are quantized on the fly


class QuantizedLinear(nn.Module):
    """nn.Linear with an int8 weight, one scale for each row, and dynamic activation quantization by token.

    Parameters: weight [out, in], weight_scale [out, 1] in fp32, bias [out]; mul_scale [in], a factor for the input if
    outliers were moved into the weight. Built on the meta device.
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
        """The row-parallel layer, all-reduced; x [B, S, in / ranks]."""
        x = self._smoothed(x)
        return self.ops.quantized_linear_all_reduce(x, self.weight, self.weight_scale.flatten(), self.bias, tp.group)

    def _smoothed(self, x: Tensor) -> Tensor:
        return x if self.mul_scale is None else x * self.mul_scale


class StaticLinear(QuantizedLinear):
    """A quantized linear layer with static activation quantization, calibrated when the model was quantized.

    Parameters: weight; input_scale [1], input_offset [1]; deq_scale [out], quant_bias [out] in int32 (see Static).
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
    """Replaces the layers of these names by quantized ones on the meta device, which use network.ops.

    blocks: the prefixes of the names of layers in blocks.

    Raises ValueError for names that are not linear layers of a block.
    """
    strange = [name for name in layers if not (name.startswith(blocks) and _is_linear(network, name))]
    if strange:
        raise ValueError(
            f"Only linear layers of blocks can be quantized; {list_faults({'are not': strange})}. Does the description "
            "belong to another model, or were embedders or the head quantized too?"
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
    """The names of the network's linear layers for which `chosen` is true."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and chosen(name)]


def quantized_parameters(network: nn.Module) -> dict[str, torch.dtype]:
    """The fixed dtypes of the parameters of quantized layers, by name, whatever the dtype of the blocks."""
    return {
        f"{name}.{leaf}": parameter.dtype
        for name, module in network.named_modules() if isinstance(module, QuantizedLinear)
        for leaf, parameter in module.named_parameters() if leaf not in ("bias", "mul_scale")
    }  # fmt: skip


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
