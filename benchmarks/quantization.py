"""W8A8 in a Wan block: the error of its output, and time and memory of its linear layers.

Weights are diffusers' initial ones. The input has a few channels with large outliers, like the residual streams of
trained transformers (Dettmers et al., arXiv 2208.07339).
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from ascend_runtime.models.shared.quantized.base import QuantizedLinear
from ascend_runtime.models.shared.quantized.replacing import QUANTIZATION_SCHEMES, linears, quantize
from ascend_runtime.checkpoints.reader import assign
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import kept_in_8_bits
from ascend_runtime.ops import PlainOperators
from ascend_runtime.ops.quantization import quantized_rows

from .report import Row, context_of

WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 1}
TOKENS, TEXT = 512, 64
QUICK_TOKENS = 128
OUTLIERS, ABOVE = 16, 20.0  # the number of outlier channels, and their factor
LARGEST_ERROR, MEMORY, NO_SLOWER = 0.01, 0.51, 1.0
TURNS, QUICK_TURNS = 7, 2
SEED = 0


def rows(quick: bool) -> list[Row]:
    """Three figures: the quantized block's error relative to the floating-point block's output, in fp32; time and bytes
    of the quantized layers relative to those in fp32 and bfloat16.

    On one thread: on a busy machine threads wait for each other, and the integer layers have more such points.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return _measured(quick)
    finally:
        torch.set_num_threads(threads)


def _measured(quick: bool) -> list[Row]:
    network = WanTransformer(WAN_1_3B)
    _fill(network)
    inputs = block_inputs(network, QUICK_TOKENS if quick else TOKENS)
    exact = network.blocks[0](*inputs)
    layers = linears(network, kept_in_8_bits)
    floats = [network.get_submodule(name) for name in layers]
    in_8_bits(network, layers)
    made = network.blocks[0](*inputs)
    integers = [network.get_submodule(name) for name in layers]
    tokens = inputs[0].shape[1]
    context = context_of(
        quick, tokens=tokens, seed=SEED, block="Wan 1.3B", outliers=OUTLIERS, above=ABOVE, threads=1
    )  # fmt: skip
    _, *turns = _turns(floats, integers, tokens, QUICK_TURNS if quick else TURNS)  # the first one warms up
    return [
        _row("relative_error", relative(made, exact), "share", LARGEST_ERROR,
             {**context, "of_what_it_adds": relative(made - inputs[0], exact - inputs[0])},
             "norm of the difference divided by that of the output; of_what_it_adds: without the residual stream"),
        _row("linear_time", statistics.median(a / b for a, b in turns), "ratio", NO_SLOWER, context,
             "median over turns of the time of the int8 layers divided by that of the fp32 ones just before"),
        _row("linear_bytes", nbytes(integers) / (nbytes(floats) / 2), "ratio", MEMORY, context,
             "the layers' parameters relative to bfloat16"),
    ]  # fmt: skip


def block_inputs(network: nn.Module, tokens: int) -> tuple[Any, ...]:
    """The fixed inputs of a block of `network`."""
    generator = torch.Generator().manual_seed(SEED)
    dim = network.config.num_attention_heads * network.config.attention_head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stream = draw(1, tokens, dim)
    stream[..., torch.randperm(dim, generator=generator)[:OUTLIERS]] *= ABOVE
    context = Context(draw(1, TEXT, network.config.text_dim))
    context.embedded = draw(1, TEXT, dim), None
    angle = draw(1, tokens, 1, network.config.attention_head_dim // 2).repeat_interleave(2, -1)
    return stream, context, draw(1, 6, dim) * 0.5, network.ops.rotary_table(angle.cos(), angle.sin())


def in_8_bits(network: nn.Module, layers: list[str]) -> None:
    """Quantizes these layers of a loaded network."""
    weights = {name: network.get_submodule(name) for name in layers}
    quantize(network, {name: QUANTIZATION_SCHEMES["w8a8_dynamic"] for name in layers}, ("blocks.",))
    for name, layer in weights.items():
        made, scale = quantized_rows(layer.weight)
        for leaf, tensor in (("weight", made), ("weight_scale", scale), ("bias", layer.bias)):
            assign(network, f"{name}.{leaf}", tensor.detach())


def relative(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


def nbytes(layers: list[nn.Module]) -> int:
    return sum(parameter.nbytes for layer in layers for parameter in layer.parameters())


def _fill(network: WanTransformer) -> None:
    """Initialises the block's parameters like diffusers; the others stay on the meta device."""
    torch.manual_seed(SEED)
    network.blocks.to_empty(device="cpu")
    for module in network.blocks.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    dim = network.blocks[0].scale_shift_table.shape[-1]
    network.blocks[0].scale_shift_table.data = torch.randn(1, 6, dim) / dim**0.5
    network.arrange(PlainOperators())


def _turns(floats: list[nn.Module], integers: list[QuantizedLinear], tokens: int, count: int) -> Iterator[tuple]:
    """(seconds of the int8 layers, seconds of the fp32 layers), one after the other."""
    inputs = [torch.randn(1, tokens, layer.in_features) for layer in floats]
    for _ in range(count + 1):
        slow, fast = (_seconds(lambda layers=layers: [layer(x) for layer, x in zip(layers, inputs)])
                      for layers in (floats, integers))  # fmt: skip
        yield fast, slow


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _row(name: str, value: float, unit: str, baseline: float, context: dict[str, Any], measure: str) -> Row:
    return Row(name=f"accelerate.w8a8.{name}", value=value, unit=unit, better="lower", baseline=baseline,
               context={**context, "measure": measure})  # fmt: skip
