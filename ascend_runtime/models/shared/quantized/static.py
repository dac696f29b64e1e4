"""Linear layers with int8 weights and statically quantized activations, by scales that were calibrated when the model
was quantized: in all steps, or in some."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ....checkpoints.msmodelslim import TIMESTEP, Layer
from ....errors import coded_error
from ....ops.quantization import Static
from ....parallel.tensor import TensorParallel
from .base import QuantizedLinear, new_parameter
from .layers import DynamicLinear


class StaticLinear(QuantizedLinear):
    """A quantized linear layer with static activation quantization, calibrated when the model was quantized.

    Parameters: weight; input_scale [1], input_offset [1]; deq_scale [out], quant_bias [out] in int32 (see Static). A
    layer without a bias has no quant_bias.
    """

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        self.input_scale, self.input_offset = (new_parameter(1, dtype=torch.float32) for _ in range(2))
        self.deq_scale = new_parameter(like.out_features, dtype=torch.float32)
        self.quant_bias = None if like.bias is None else new_parameter(like.out_features, dtype=torch.int32)

    def _product(self, x: Tensor) -> Tensor:
        return self.ops.static_linear(self._smoothed(x), self.weight, self._static())

    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.static_linear_all_reduce(self._smoothed(x), self.weight, self._static(), tp.group)

    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.static_linear_part(self._smoothed(x), self.weight, self._static())

    def _added(self, dtype: torch.dtype) -> Tensor | None:
        return self._static().added(dtype)

    def _static(self) -> Static:
        return Static(self.input_scale, self.input_offset, self.deq_scale, self.quant_bias)

    def dequantized(self) -> Tensor:
        return self._unsmoothed(self.weight * (self.deq_scale / self.input_scale)[:, None])


class TimestepLinear(DynamicLinear):
    """A quantized linear layer that quantizes activations dynamically in some steps and statically in others, as MindIE
    SD's W8A8TimeStepQuantLinear does by its TimestepPolicyConfig.

    Parameters: those of DynamicLinear; input_scale and input_offset [steps, 1], deq_scale and quant_bias
    [steps, out], of which each step has its own. step: the one whose static scales are used; None: dynamic.
    """

    step: int | None = None

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        super()._add_scales(like, layer)
        self.input_scale, self.input_offset = (new_parameter(layer.steps, 1, dtype=torch.float32) for _ in range(2))
        self.deq_scale = new_parameter(layer.steps, like.out_features, dtype=torch.float32)
        self.quant_bias = None
        if like.bias is not None:
            self.quant_bias = new_parameter(layer.steps, like.out_features, dtype=torch.int32)

    def _product(self, x: Tensor) -> Tensor:
        if self.step is None:
            return super()._product(x)
        return self.ops.static_linear(self._smoothed(x), self.weight, self._static(self.step))

    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        if self.step is None:
            return super()._all_reduced(x, tp)
        return self.ops.static_linear_all_reduce(self._smoothed(x), self.weight, self._static(self.step), tp.group)

    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        if self.step is None:
            return super()._part(x, tp)
        return self.ops.static_linear_part(self._smoothed(x), self.weight, self._static(self.step))

    def _added(self, dtype: torch.dtype) -> Tensor | None:
        return super()._added(dtype) if self.step is None else self._static(self.step).added(dtype)

    def _static(self, step: int) -> Static:
        bias = None if self.quant_bias is None else self.quant_bias[step]
        return Static(self.input_scale[step], self.input_offset[step], self.deq_scale[step], bias)


def check_static_steps(network: nn.Module, steps: tuple[int, int] | None, source: Path | None) -> None:
    """Raises ValueError if layers have no static scales for these steps (first, end), which the file `source` names."""
    numbers = [len(module.input_scale) for module in network.modules() if isinstance(module, TimestepLinear)]
    if steps is None or numbers and steps[1] <= min(numbers):
        return
    why = f"the model has scales for {min(numbers)} steps" if numbers else f"no layer of the model is in {TIMESTEP}"
    advice = "Correct it, or leave static_steps out to quantize activations dynamically in all steps."
    raise coded_error("AV-1408", f"{source} sets static_steps to {list(steps)}, but {why}. {advice}")


def use_step(network: nn.Module, step: int | None) -> None:
    """Layers with static scales for each step use those of this step from now on; None: they quantize dynamically."""
    for module in network.modules():
        if isinstance(module, TimestepLinear):
            module.step = step
