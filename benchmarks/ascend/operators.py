"""Each operator of a device: its error against torch on the CPU in fp32, and its time against torch on the same device,
or for attention against the one that is chosen automatically.

A command of `benchmarks.ascend`: python -m benchmarks.ascend.operators KIND FOLDER [--quick]. FOLDER gets rows.jsonl,
and notes.jsonl with what is not measured.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor
from torch.utils import benchmark

from ascend_runtime.hardware import devices
from ascend_runtime.ops import PlainOperators, card_rules, check_quantized, libraries, operators_for
from ascend_runtime.ops.ascend import OPERATOR_OF
from ascend_runtime.specs import OperatorSpec
from ascend_runtime.specs.jobs import ATTENTIONS

from ..report import Notes, Row, context_of, to_json
from . import cases
from .cases import Bound, Case, Draw, Size
from .machine import cann_version

MEASURE = "largest |difference| divided by the largest |value| of torch on the CPU in fp32, with equal inputs"
# The allowed error. Rounding to bfloat16 has an error of at most 1/512, to float16 1/4096; a sum may have more.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}
LARGEST_FP8_ERROR = 0.15  # MXFP8 has a mantissa of three bits: 0.08 by plain arithmetic, of random query, key, value
NO_SLOWER = 1.05  # times the rival's time; smaller differences are noise
TURNS = 4


def measure(device: torch.device, quick: bool, notes: Notes) -> Iterator[Row]:
    dtype = torch.bfloat16 if device.type == "cpu" else devices.default_dtype(device)
    size = cases.TINY if device.type == "cpu" else cases.WAN_14B_720P
    small = replace(size, tokens=min(size.tokens, cases.TOKENS_OF_TWIN))
    default = operators_for(device, OperatorSpec(attention="auto", layer_norm="fused"), dtype)
    bench = Bench(device, dtype, default, small if quick else size, small, quick)
    ways = attention_ways(device, dtype, notes)
    for name, case in cases.ATTENTION.items():
        yield from bench.rows(case, {f"{name}_{way}": operators for way, operators in ways.items()}, notes)
    for name, case in cases.OTHERS.items():
        yield from bench.rows(case, {name: default}, notes)
    for form, (name, case) in cases.QUANTIZED.items():
        try:
            check_quantized(device, dtype, [form])
        except ValueError as error:
            notes.leave_out(name, error)
            continue
        yield from bench.rows(case, {name: default}, notes)
    for name, why in cases.LEFT_OUT.items():
        notes.leave_out(name, why)


def attention_ways(device: torch.device, dtype: torch.dtype, notes: Notes) -> dict[str, PlainOperators]:
    """The operators of `device`, by their kind of attention."""
    ways = {}
    for name in ATTENTIONS[1:]:  # the first lets the environment choose
        try:
            operators = operators_for(device, OperatorSpec(attention=name, layer_norm="fused"), dtype)
        except ValueError as error:
            notes.leave_out(f"attention {name}", error)
            continue
        if not operators.npu and name != "plain":
            notes.leave_out(f"attention {name}", "only on NPUs; torch's attention is used instead")
        elif name != "plain" and not card_rules.supports(operators.card, OPERATOR_OF[name], dtype):
            notes.leave_out(f"attention {name}", f"cards of {card_rules.SERIES[operators.card]} compute auto instead")
        else:
            ways[name] = operators
    return ways


@dataclass(frozen=True)
class Bench:
    """Measures on `device`: time at `size`, error at `small`."""

    device: torch.device
    dtype: torch.dtype
    default: PlainOperators
    size: Size
    small: Size
    quick: bool

    @property
    def _only_tried(self) -> bool:
        """Whether times say nothing: on a CPU, of everything tiny."""
        return self.quick and self.device.type == "cpu"

    def rows(self, case: Case, ways: dict[str, PlainOperators], notes: Notes) -> Iterator[Row]:
        """Two rows for each implementation, by name."""
        inputs = case.inputs(self._drawer(torch.Generator().manual_seed(0)), self.small)
        exact = (x.float() if x.dtype == self.dtype else x for x in inputs)
        twin = _outputs(case.bind(PlainOperators(), *exact))
        inputs = tuple(x.to(self.device) for x in inputs)
        for name, operators in ways.items():
            with notes.noted(name):
                yield self._error(name, operators, _outputs(case.bind(operators, *inputs)), twin)
        with notes.noted(f"{', '.join(ways)} by {case.against}"):
            inputs = case.inputs(self._drawer(None), self.size)
            rival = case.rival(self.default, *inputs) if case.rival else case.bind(PlainOperators(), *inputs)
            for name, operators in ways.items():
                with notes.noted(name):
                    yield self._time(name, operators, case.bind(operators, *inputs), rival, case.against)
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

    def _time(self, name: str, operators: PlainOperators, call: Bound, rival: Bound, against: str) -> Row:
        """Measures both in turns, and takes each one's best, so that other load on the machine affects both."""
        turns = [(self._seconds(call), self._seconds(rival)) for _ in range(1 if self._only_tried else TURNS)]
        best, best_rival = map(min, zip(*turns))
        context = self._context(
            operators, self.size, measure=f"time divided by that of {against}",
            ms=round(best * 1e3, 4), rival_ms=round(best_rival * 1e3, 4),
        )  # fmt: skip
        return Row(
            name=f"ascend.{name}_time", value=best / best_rival, unit="ratio", better="lower", baseline=NO_SLOWER,
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
        if self._only_tried:
            return timer.timeit(1).median
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
        card["cann"] = cann_version()
    return card


def main() -> None:
    kind, folder, *options = sys.argv[1:]
    if kind == "npu":
        libraries.torch_npu()
    device, notes = devices.take(kind, 0), Notes(Path(folder) / "notes.jsonl")
    with torch.no_grad(), (Path(folder) / "rows.jsonl").open("a") as out:
        for row in measure(device, "--quick" in options, notes):
            print(to_json(row), end="", file=out, flush=True)


if __name__ == "__main__":
    main()
