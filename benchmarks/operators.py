"""Each operator of a device: its error against torch on the CPU in fp32, and its time against torch on the same device.

A command of `benchmarks.ascend`: python -m benchmarks.operators KIND FILE [--quick]
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from torch.utils import benchmark

from ascend_runtime.hardware import devices
from ascend_runtime.ops import PlainOperators, libraries, operators_for
from ascend_runtime.specs import OperatorSpec
from ascend_runtime.specs.jobs import ATTENTIONS

from .report import Failures, Row, context_of, leave_out, to_json

EPS = 1e-6
MEASURE = "largest |difference| divided by the largest |value| of torch on the CPU in fp32, with equal inputs"
# The allowed error. Rounding to bfloat16 has an error of at most 1/512, to float16 1/4096; a sum may have more.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}
LARGEST_FP8_ERROR = 5e-2  # MXFP8 has a mantissa of three bits
NO_SLOWER = 1.05  # times torch's time; smaller differences are noise
TURNS = 4


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
TINY = Size(tokens=96, text=16, heads=4, head_dim=32, ffn=256)

Draw = Callable[..., Tensor]  # (*shape, dtype=the blocks' dtype) -> random tensor
Bound = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """An operator with its inputs. bind: (operators, *inputs) -> the call to measure."""

    inputs: Callable[[Draw, Size], tuple[Tensor, ...]]
    bind: Callable[..., Bound]


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


ATTENTION = {
    "attention": Case(lambda d, s: _heads(d, s, *[s.tokens] * 3), lambda ops, *qkv: partial(ops.attention, *qkv)),
    "cross_attention": Case(
        lambda d, s: _heads(d, s, s.tokens, s.text, s.text), lambda ops, *qkv: partial(ops.attention, *qkv)
    ),
}
OTHERS = {
    "attention_with_lse": Case(ATTENTION["attention"].inputs, lambda ops, *qkv: partial(ops.attention_with_lse, *qkv)),
    "rms_norm": Case(lambda d, s: (_tokens(d, s), d(s.dim)), lambda ops, *args: partial(ops.rms_norm, *args, EPS)),
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


def measure(device: torch.device, quick: bool, failures: Failures) -> Iterator[Row]:
    dtype = torch.bfloat16 if device.type == "cpu" else devices.default_dtype(device)
    size = TINY if device.type == "cpu" else WAN_14B_720P
    small = replace(size, tokens=min(size.tokens, TOKENS_OF_TWIN))
    bench = Bench(device, dtype, small if quick else size, small, quick)
    ways = attention_ways(device, dtype)
    for name, case in ATTENTION.items():
        yield from bench.rows(case, {f"{name}_{way}": operators for way, operators in ways.items()}, failures)
    default = operators_for(device, OperatorSpec(attention="fused", layer_norm="fused"), dtype)
    for name, case in OTHERS.items():
        yield from bench.rows(case, {name: default}, failures)
    leave_out("linear_all_reduce", "it needs several ranks; the parallel modes tp2, tp4, tp8 measure it")


def attention_ways(device: torch.device, dtype: torch.dtype) -> dict[str, PlainOperators]:
    """The operators of `device`, by their kind of attention."""
    ways = {}
    for name in ATTENTIONS[1:]:  # the first lets the environment choose
        try:
            operators = operators_for(device, OperatorSpec(attention=name, layer_norm="fused"), dtype)
        except ValueError as error:
            leave_out(f"attention {name}", error)
            continue
        if operators.npu or name == "plain":
            ways[name] = operators
        else:
            leave_out(f"attention {name}", "only on NPUs; torch's attention is used instead")
    return ways


@dataclass(frozen=True)
class Bench:
    """Measures on `device`: time at `size`, error at `small`."""

    device: torch.device
    dtype: torch.dtype
    size: Size
    small: Size
    quick: bool

    def rows(self, case: Case, ways: dict[str, PlainOperators], failures: Failures) -> Iterator[Row]:
        """Two rows for each implementation, by name."""
        inputs = case.inputs(self._drawer(torch.Generator().manual_seed(0)), self.small)
        twin = _outputs(case.bind(PlainOperators(), *(x.float() for x in inputs)))
        inputs = tuple(x.to(self.device) for x in inputs)
        for name, operators in ways.items():
            with failures.noted(name):
                yield self._error(name, operators, _outputs(case.bind(operators, *inputs)), twin)
        with failures.noted(f"{', '.join(ways)} by torch's own"):
            inputs = case.inputs(self._drawer(None), self.size)
            plain = case.bind(PlainOperators(), *inputs)
            for name, operators in ways.items():
                with failures.noted(name):
                    yield self._time(name, operators, case.bind(operators, *inputs), plain)
        devices.empty_cache(self.device)

    def _drawer(self, generator: torch.Generator | None) -> Draw:
        """On the CPU with a generator, so that all devices get equal values; else on the device."""
        device = self.device if generator is None else "cpu"

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return draw

    def _error(self, name: str, operators: PlainOperators, outputs: tuple, twin: tuple) -> Row:
        pairs = [(out.float().cpu(), exact) for out, exact in zip(outputs, twin, strict=True)]
        errors = [float((out - exact).abs().max() / exact.abs().max()) for out, exact in pairs]
        if not all(map(math.isfinite, errors)):
            raise ValueError("the output has NaN or infinite values")
        bar = LARGEST_FP8_ERROR if name.endswith("_fp8") else LARGEST_ERROR[self.dtype]
        context = self._context(operators, self.small, measure=MEASURE)
        return Row(
            name=f"ascend.{name}_error", value=max(errors), unit="share", better="lower", baseline=bar,
            context=context,
        )  # fmt: skip

    def _time(self, name: str, operators: PlainOperators, call: Bound, plain: Bound) -> Row:
        """Measures both in turns, and takes each one's best, so that other load on the machine affects both."""
        turns = [(self._seconds(call), self._seconds(plain)) for _ in range(TURNS)]
        best, best_plain = map(min, zip(*turns))
        context = self._context(
            operators, self.size, measure="time divided by that of torch on the same device",
            ms=round(best * 1e3, 4), torch_ms=round(best_plain * 1e3, 4),
        )  # fmt: skip
        return Row(
            name=f"ascend.{name}_time", value=best / best_plain, unit="ratio", better="lower", baseline=NO_SLOWER,
            context=context,
        )  # fmt: skip

    def _context(self, operators: PlainOperators, size: Size, **more) -> dict[str, Any]:
        return context_of(
            self.quick, self.device.type, **_card(self.device), operators=type(operators).__name__,
            dtype=str(self.dtype).removeprefix("torch."), **asdict(size), **more,
        )  # fmt: skip

    def _seconds(self, call: Bound) -> float:
        def now() -> float:
            devices.synchronise(self.device)
            return time.perf_counter()

        timer = benchmark.Timer("call()", globals={"call": call}, timer=now, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.01 if self.quick else 0.3).median


def _outputs(call: Bound) -> tuple[Tensor, ...]:
    out = call()
    return out if isinstance(out, tuple) else (out,)


@lru_cache(maxsize=None)
def _card(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        return {}
    card = {"device_name": getattr(torch, device.type).get_device_name(device)}
    if device.type == "npu":
        card["cann"] = import_module("torch_npu.utils.collect_env").get_cann_version()
    return card


def main() -> None:
    kind, file, *options = sys.argv[1:]
    if kind == "npu":
        libraries.torch_npu()
    device, failures = devices.take(kind, 0), Failures()
    with torch.no_grad(), Path(file).open("a") as out:
        for row in measure(device, "--quick" in options, failures):
            print(to_json(row), end="", file=out, flush=True)
    failures.exit_if_any()


if __name__ == "__main__":
    main()
