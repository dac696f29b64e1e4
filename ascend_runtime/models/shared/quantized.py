"""Linear layers with quantized weights and activations: int8 (W8A8), fp8 in groups (MXFP8), or 4 bits (W4A4).

They use a quarter of the memory of fp32 layers or less, and compute products of what their formats hold. The layers to
quantize are listed in a file (checkpoints/msmodelslim.py), or chosen by the family's rule if weights are quantized on
the fly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints.faults import list_faults
from ...checkpoints.msmodelslim import DYNAMIC, INT4, MXFP8, STATIC, TIMESTEP, Layer
from ...errors import coded_error
from ...ops import PlainOperators, in_preferred_layout, mxfp8, packing
from ...ops.quantization import Static, smoothed
from ...parallel.tensor import TensorParallel

QUANTIZATION_SCHEMES = {"w8a8_dynamic": Layer(DYNAMIC)}  # for weights that are quantized on the fly


class QuantizedLinear(nn.Module):
    """nn.Linear with an int8 weight, one scale for each row, and dynamic activation quantization by token.

    Parameters: weight [out, in], weight_scale [out, 1] in fp32, bias [out]; mul_scale [in], a factor for the input if
    outliers were moved into the weight. Built on the meta device.

    multiple: tensor parallelism cuts the weight's inputs in multiples of it. whole: whether their number must be one
    too. free: the parameters that are kept in the dtype of the blocks. by_layout: whether the device's operator prefers
    a layout of the weight.
    """

    ops: PlainOperators
    multiple, whole, by_layout = 1, False, True
    free = ("bias", "mul_scale")

    def __init__(self, like: nn.Linear, layer: Layer):
        super().__init__()
        self.in_features = like.in_features
        self.mul_scale = _parameter(like.in_features, dtype=like.weight.dtype) if layer.smoothed else None
        self._add_weight(like)
        self._add_scales(like, layer)

    def _add_weight(self, like: nn.Linear) -> None:
        self.weight = _parameter(like.out_features, like.in_features, dtype=torch.int8)

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        self.weight_scale = _parameter(like.out_features, 1, dtype=torch.float32)
        self.bias = None if like.bias is None else _parameter(like.out_features, dtype=like.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        return self.ops.quantized_linear(x, *self._weights(), self.bias, self.mul_scale)

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """The row-parallel layer, all-reduced; x [B, S, in / ranks]."""
        return self.ops.quantized_linear_all_reduce(self._smoothed(x), *self._weights(), self.bias, tp.group)

    def part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """This rank's summand in `all_reduced`, whose sum is short of `added`."""
        return self.ops.quantized_linear_part(self._smoothed(x), *self._weights(), tp.group)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the sum of the ranks' parts: the bias [out]."""
        return None if self.bias is None else self.bias.to(dtype)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight_scale.flatten()

    def _smoothed(self, x: Tensor) -> Tensor:
        return smoothed(x, self.mul_scale)


class Int4Linear(QuantizedLinear):
    """A quantized linear layer in 4 bits. Parameters: as above, but weight [out, in / 2] (see ops/packing.py)."""

    multiple, whole, by_layout = packing.PER_INT32, True, False

    def _add_weight(self, like: nn.Linear) -> None:
        self.weight = _parameter(like.out_features, like.in_features // packing.PER_BYTE, dtype=torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.int4_linear(x, *self._weights(), self.bias, self.mul_scale)

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.int4_linear_all_reduce(self._smoothed(x), *self._weights(), self.bias, tp.group)

    def part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.int4_linear_part(self._smoothed(x), *self._weights(), tp.group)


class MxLinear(QuantizedLinear):
    """A quantized linear layer in MXFP8 (see ops/mxfp8.py).

    Parameters: weight [out, in], the bits of fp8 in uint8; weight_scale [out, groups], exponents in uint8; bias [out]
    in fp32, as the operator takes it; mul_scale.
    """

    multiple, by_layout = mxfp8.MX_GROUP, False
    free = ("mul_scale",)

    def _add_weight(self, like: nn.Linear) -> None:
        self.weight = _parameter(like.out_features, like.in_features, dtype=torch.uint8)

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        groups = mxfp8.groups_of(like.in_features)
        self.weight_scale = _parameter(like.out_features, groups, dtype=torch.uint8)
        self.bias = None if like.bias is None else _parameter(like.out_features, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.mx_linear(self._smoothed(x), *self._weights(), self.bias)

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.mx_linear_all_reduce(self._smoothed(x), *self._weights(), self.bias, tp.group)

    def part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.mx_linear(self._smoothed(x), *self._weights(), None)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.weight.view(mxfp8.E4M3), self.weight_scale


class StaticLinear(QuantizedLinear):
    """A quantized linear layer with static activation quantization, calibrated when the model was quantized.

    Parameters: weight; input_scale [1], input_offset [1]; deq_scale [out], quant_bias [out] in int32 (see Static). A
    layer without a bias has no quant_bias.
    """

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        self.input_scale, self.input_offset = (_parameter(1, dtype=torch.float32) for _ in range(2))
        self.deq_scale = _parameter(like.out_features, dtype=torch.float32)
        self.quant_bias = None if like.bias is None else _parameter(like.out_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.static_linear(self._smoothed(x), self.weight, self._static())

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.static_linear_all_reduce(self._smoothed(x), self.weight, self._static(), tp.group)

    def part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.static_linear_part(self._smoothed(x), self.weight, self._static())

    def added(self, dtype: torch.dtype) -> Tensor | None:
        return self._static().added(dtype)

    def _static(self) -> Static:
        return Static(self.input_scale, self.input_offset, self.deq_scale, self.quant_bias)


class TimestepLinear(QuantizedLinear):
    """A quantized linear layer that quantizes activations dynamically in some steps and statically in others, as MindIE
    SD's W8A8TimeStepQuantLinear does by its TimestepPolicyConfig.

    Parameters: those of QuantizedLinear; input_scale and input_offset [steps, 1], deq_scale and quant_bias
    [steps, out], of which each step has its own. step: the one whose static scales are used; None: dynamic.
    """

    step: int | None = None

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        super()._add_scales(like, layer)
        self.input_scale, self.input_offset = (_parameter(layer.steps, 1, dtype=torch.float32) for _ in range(2))
        self.deq_scale = _parameter(layer.steps, like.out_features, dtype=torch.float32)
        self.quant_bias = None if like.bias is None else _parameter(layer.steps, like.out_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.step is None:
            return super().forward(x)
        return self.ops.static_linear(self._smoothed(x), self.weight, self._static(self.step))

    def all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        if self.step is None:
            return super().all_reduced(x, tp)
        return self.ops.static_linear_all_reduce(self._smoothed(x), self.weight, self._static(self.step), tp.group)

    def part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        if self.step is None:
            return super().part(x, tp)
        return self.ops.static_linear_part(self._smoothed(x), self.weight, self._static(self.step))

    def added(self, dtype: torch.dtype) -> Tensor | None:
        return super().added(dtype) if self.step is None else self._static(self.step).added(dtype)

    def _static(self, step: int) -> Static:
        bias = None if self.quant_bias is None else self.quant_bias[step]
        return Static(self.input_scale[step], self.input_offset[step], self.deq_scale[step], bias)


KINDS = {
    DYNAMIC: QuantizedLinear, STATIC: StaticLinear, TIMESTEP: TimestepLinear, MXFP8: MxLinear, INT4: Int4Linear
}  # fmt: skip


def quantize(network: nn.Module, layers: Mapping[str, Layer], blocks: tuple[str, ...]) -> None:
    """Replaces the layers of these names by quantized ones on the meta device, which use network.ops.

    blocks: the prefixes of the names of layers in blocks.

    Raises ValueError for names that are not linear layers of a block.
    """
    strange = [name for name in layers if not (name.startswith(blocks) and _is_linear(network, name))]
    if strange:
        raise coded_error(
            "AV-1408",
            f"Only linear layers of blocks can be quantized; {list_faults({'are not': strange})}. Does the description "
            "belong to another model, or were embedders or the head quantized too?",
        )
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        made = KINDS[layer.algorithm](network.get_submodule(name), layer)
        made.ops = network.ops
        setattr(network.get_submodule(owner), leaf, made)


def _is_linear(network: nn.Module, name: str) -> bool:
    try:
        return isinstance(network.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def prefer_layouts(network: nn.Module) -> None:
    """Brings int8 weights into the layout that the device's operator prefers. Nothing may copy to them afterwards."""
    for module in network.modules():
        if isinstance(module, QuantizedLinear) and module.by_layout:
            module.weight = nn.Parameter(in_preferred_layout(module.weight.data), requires_grad=False)


def linears(network: nn.Module, chosen: Callable[[str], bool]) -> Iterable[str]:
    """The names of the network's linear layers for which `chosen` is true."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and chosen(name)]


def quantized_parameters(network: nn.Module) -> dict[str, torch.dtype]:
    """The fixed dtypes of the parameters of quantized layers, by name, whatever the dtype of the blocks."""
    return {
        f"{name}.{leaf}": parameter.dtype
        for name, module in network.named_modules() if isinstance(module, QuantizedLinear)
        for leaf, parameter in module.named_parameters() if leaf not in module.free
    }  # fmt: skip


def check_cuts(network: nn.Module, cut_dim: Callable[[str], int | None], degree: int) -> None:
    """Raises ValueError if tensor parallelism of this degree would cut groups of a quantized weight's inputs apart, or
    if the inputs do not fit the format. cut_dim: the dim along which it cuts a parameter, by name."""
    kinds = {made: algorithm for algorithm, made in KINDS.items()}
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    for name, layer in layers.items():
        cuts = degree if cut_dim(f"{name}.weight") == 1 else 1
        width, multiple, kind = layer.in_features // cuts, layer.multiple, kinds[type(layer)]
        if layer.whole and layer.in_features % multiple:
            raise coded_error(
                "AV-1407",
                f"{name} has {layer.in_features} inputs; {kind} needs a multiple of {multiple}. Use the model's "
                "W8A8_DYNAMIC, bf16 or fp16 form.",
            )
        if cuts > 1 and width % multiple:
            raise coded_error(
                "AV-1415",
                f"tp_degree is {degree}, which gives each rank {width} of the {layer.in_features} inputs of {name}, "
                f"but its {kind} weights can only be cut in multiples of {multiple}. Set tp_degree to a smaller "
                "number, and use the other ranks for ulysses_degree or ring_degree.",
            )


def check_static_steps(network: nn.Module, steps: tuple[int, int] | None, source: Path | None) -> None:
    """Raises ValueError if layers have no static scales for these steps (first, end), which the file `source` names."""
    numbers = [len(module.input_scale) for module in network.modules() if isinstance(module, TimestepLinear)]
    if steps is None or numbers and steps[1] <= min(numbers):
        return
    why = f"the model has scales for {min(numbers)} steps" if numbers else f"no layer of the model is in {TIMESTEP}"
    advice = "Correct it, or leave static_steps out to quantize activations dynamically in all steps."
    raise coded_error("AV-1408", f"{source} sets static_steps to {list(steps)}, but {why}. {advice}")


def use_step(network: nn.Module, step: int | None) -> None:
    """Makes layers that have static scales for each step use those of this one; None: quantize dynamically."""
    for module in network.modules():
        if isinstance(module, TimestepLinear):
            module.step = step


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
