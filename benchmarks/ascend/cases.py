"""The operators that are measured: their inputs, how they are called, and by whose time theirs is divided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_runtime.ops import PlainOperators, in_preferred_layout
from ascend_runtime.ops.mxfp8 import mx_quantized
from ascend_runtime.ops.packing import INT4_MAX, int4_pairs
from ascend_runtime.ops.quantization import Static
from ascend_runtime.ops.sparse import BLOCK

EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """The sizes of the inputs. text: text tokens; ffn: width of the feed-forward."""

    tokens: int
    text: int
    heads: int
    head_dim: int
    ffn: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


WAN_14B_720P = Size(tokens=75600, text=512, heads=40, head_dim=128, ffn=13824)  # 1280 x 720, 81 frames
TOKENS_OF_TWIN = 4096  # takes a CPU seconds; above the 2048 tokens from which laser attention is used
TINY = Size(tokens=160, text=16, heads=2, head_dim=64, ffn=256)

Draw = Callable[..., Tensor]  # (*shape, dtype=the blocks' dtype) -> random tensor
Bound = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """An operator with its inputs. bind: (operators, *inputs) -> the call to measure.

    rival: (the device's default operators, *inputs) -> the call by whose time its own is divided; None: torch's own.
    """

    inputs: Callable[[Draw, Size], tuple[Tensor, ...]]
    bind: Callable[..., Bound]
    rival: Callable[..., Bound] | None = None
    against: str = "torch on the same device"


def _rotary_inputs(draw: Draw, size: Size) -> tuple[Tensor, ...]:
    angle = draw(1, size.tokens, 1, size.head_dim // 2, dtype=torch.float32).repeat_interleave(2, -1)
    return draw(1, size.tokens, size.heads, size.head_dim), angle.cos(), angle.sin()


def _rotary(operators: PlainOperators, x: Tensor, cos: Tensor, sin: Tensor) -> Bound:
    return partial(operators.rotary, x, operators.rotary_table(cos, sin))  # the table is made once per video


def _tokens(draw: Draw, size: Size) -> Tensor:
    return draw(1, size.tokens, size.dim)


def _rows(draw: Draw, size: Size, count: int, rows: int = 1) -> list[Tensor]:
    """Modulation parameters: fp32 [1, rows, D]."""
    return [draw(1, rows, size.dim, dtype=torch.float32) for _ in range(count)]


def _heads(draw: Draw, size: Size, *lengths: int) -> tuple[Tensor, ...]:
    return tuple(draw(1, length, size.heads, size.head_dim) for length in lengths)


def _attend(operators: PlainOperators, *qkv: Tensor) -> Bound:
    return partial(operators.attention, *qkv)


def _sparse_inputs(draw: Draw, size: Size) -> tuple[Tensor, ...]:
    """Query, key, value [1, heads, S, head_dim], and a mask with half of the mask blocks."""
    blocks = -(-size.tokens // BLOCK)
    mask = draw(1, size.heads, blocks, blocks, dtype=torch.float32) > 0
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)  # no row is empty
    return *(draw(1, size.heads, size.tokens, size.head_dim) for _ in range(3)), mask


def _sparse(operators: PlainOperators, *inputs: Tensor) -> Bound:
    *qkv, mask = inputs
    return partial(operators.sparse_attention, *qkv, operators.sparse_pattern(mask))  # kept with a plan


def _dense(operators: PlainOperators, *inputs: Tensor) -> Bound:
    return _attend(operators, *(x.transpose(1, 2).contiguous() for x in inputs[:3]))


AUTO, LINEAR = "attention auto", "the linear layer in floating point"
# Quantized linear layers of the feed-forward's first size: x [1, S, D], weight [F, D]


def _integers(draw: Draw, *shape: int, limit: int = 127) -> Tensor:
    return (draw(*shape, dtype=torch.float32) * limit / 3).round().clamp(-limit, limit).to(torch.int8)


def _scale(draw: Draw, size: Size, limit: int = 127) -> Tensor:
    """Of each row of a weight, [F] in fp32: products have about the size of x."""
    return draw(size.ffn, dtype=torch.float32).abs().add(0.5) * 3 / limit / math.sqrt(size.dim)


def _dynamic_inputs(draw: Draw, size: Size) -> tuple[Tensor, ...]:
    return _tokens(draw, size), _integers(draw, size.ffn, size.dim), _scale(draw, size), draw(size.ffn)


def _int4_inputs(draw: Draw, size: Size) -> tuple[Tensor, ...]:
    pairs = int4_pairs(_integers(draw, size.ffn, size.dim, limit=INT4_MAX))
    return _tokens(draw, size), pairs, _scale(draw, size, INT4_MAX), draw(size.ffn)


def _mx_inputs(draw: Draw, size: Size) -> tuple[Tensor, ...]:
    weight = draw(size.ffn, size.dim, dtype=torch.float32) / math.sqrt(size.dim)
    return _tokens(draw, size), *mx_quantized(weight), draw(size.ffn, dtype=torch.float32)


def _static_inputs(draw: Draw, size: Size) -> tuple[Tensor, ...]:
    one = draw(1, dtype=torch.float32) * 0
    x, weight, scale, bias = _dynamic_inputs(draw, size)
    return x, weight, one + 0.03, one + 3, scale * 0.03, (bias.float() / scale / 0.03).round().to(torch.int32)


def _laid(operators: PlainOperators, weight: Tensor) -> Tensor:
    """As the loader lays an int8 weight out."""
    return in_preferred_layout(weight) if operators.npu else weight


def _static(operators: PlainOperators, x: Tensor, weight: Tensor, *static: Tensor) -> Bound:
    return partial(operators.static_linear, x, _laid(operators, weight), Static(*static))


def _dynamic(operators: PlainOperators, x: Tensor, weight: Tensor, *others: Tensor) -> Bound:
    return partial(operators.quantized_linear, x, _laid(operators, weight), *others)


def _linear(_: PlainOperators, x: Tensor, weight: Tensor, *others: Tensor) -> Bound:
    """The layer that is not quantized, in x's dtype."""
    return partial(F.linear, x, x.new_empty(weight.shape[0], x.shape[-1]).fill_(1.0))


QUANTIZED = {  # msModelSlim's format -> the operator's name and case
    "W8A8_DYNAMIC": ("quantized_linear", Case(_dynamic_inputs, _dynamic, _linear, LINEAR)),
    "W8A8": ("static_linear", Case(_static_inputs, _static, _linear, LINEAR)),
    "W4A4_DYNAMIC": (
        "int4_linear",
        Case(_int4_inputs, lambda ops, *args: partial(ops.int4_linear, *args), _linear, LINEAR),
    ),
    "W8A8_MXFP8": ("mx_linear", Case(_mx_inputs, lambda ops, *args: partial(ops.mx_linear, *args), _linear, LINEAR)),
}
ATTENTION = {
    "attention": Case(lambda d, s: _heads(d, s, *[s.tokens] * 3), _attend, _attend, AUTO),
    "cross_attention": Case(lambda d, s: _heads(d, s, s.tokens, s.text, s.text), _attend, _attend, AUTO),
}
OTHERS = {
    "attention_with_lse": Case(
        ATTENTION["attention"].inputs, lambda ops, *qkv: partial(ops.attention_with_lse, *qkv), _attend, AUTO
    ),
    "sparse_attention": Case(_sparse_inputs, _sparse, _dense, "full attention"),
    "rms_norm": Case(lambda d, s: (_tokens(d, s), d(s.dim)), lambda ops, *args: partial(ops.rms_norm, *args, EPS)),
    "rms_norm_per_head": Case(  # as in HunyuanVideo
        lambda d, s: (*_heads(d, s, s.tokens), d(s.head_dim)), lambda ops, *args: partial(ops.rms_norm, *args, EPS)
    ),
    "layer_norm": Case(
        lambda d, s: (_tokens(d, s), *(row.flatten() for row in _rows(d, s, 2))),
        lambda ops, *args: partial(ops.layer_norm, *args, EPS),
    ),
    "modulated_layer_norm": Case(
        lambda d, s: (_tokens(d, s), *_rows(d, s, 2)), lambda ops, *args: partial(ops.modulated_layer_norm, *args, EPS)
    ),
    "modulated_layer_norm_per_token": Case(
        lambda d, s: (_tokens(d, s), *_rows(d, s, 2, s.tokens)),
        lambda ops, *args: partial(ops.modulated_layer_norm, *args, EPS),
    ),
    "gated_add": Case(
        lambda d, s: (_tokens(d, s), _tokens(d, s), *_rows(d, s, 1)), lambda ops, *args: partial(ops.gated_add, *args)
    ),
    "rotary": Case(_rotary_inputs, _rotary),
    "gelu": Case(lambda d, s: (d(1, s.tokens, s.ffn),), lambda ops, x: partial(ops.gelu, x)),
}

OF_RANKS = "it needs several ranks"
LEFT_OUT = {
    **dict.fromkeys(("linear_all_reduce", "summed"), f"{OF_RANKS}; the parallel modes tp2, tp4, tp8 measure it"),
    **{f"{name}_all_reduce": f"{OF_RANKS}, and no parallel mode is quantized" for name, _ in QUANTIZED.values()},
    **{f"{name}_part": f"{OF_RANKS}, and no parallel mode is quantized"
       for name in ("quantized_linear", "int4_linear", "static_linear")},
}
