"""The cost of a request to two ranks, against a pickled socket and ray actors in the same run."""

from __future__ import annotations

import time
from importlib.util import find_spec
from statistics import median
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ascend_runtime import ParallelSpec, Runtime

from . import peers
from .report import Row, context_of

SENT = 16_777_216 // 4  # floats: 16.8 MB to every rank
REPLY = 8_388_608 // 4  # floats: 8.4 MB back
FRAMES = (81, 480, 832, 3)  # 388 MB in fp32
PAGE = 4096 // 4  # floats per page


class Ours:
    """Two ranks of the runtime."""

    name = "ranks"

    def __init__(self):
        self._runtime = Runtime(ParallelSpec(ranks=2), device="cpu")
        self._runtime.start()

    def null(self) -> None:
        self._runtime.ping()

    def request(self, tensor: Tensor, reply: int) -> Tensor:
        return self._runtime.ping(tensor, reply).tensor

    def frames(self, shape: tuple[int, ...]) -> Tensor:
        return self._runtime.ping(frames=shape).tensor

    def close(self) -> None:
        self._runtime.stop()


def run(quick: bool) -> Iterator[Row]:
    if find_spec("ray") is None:
        raise SystemExit("The transport is compared with ray, which is missing: pip install -r requirements-dev.txt")
    systems = [Ours(), peers.Socket(), peers.Ray()]
    sent = torch.rand(1000 if quick else SENT)
    reply, frames = (500, (5, 48, 64, 3)) if quick else (REPLY, FRAMES)
    # name, unit, bar, scale from seconds, rounds, calls a round, call
    measured = (
        ("transport.null_ms", "ms", 0.2, 1e3, 40, 50, lambda system: system.null()),
        ("transport.request_ms", "ms", 15.0, 1e3, 40, 1, lambda system: system.request(sent, reply)),
        ("transport.frames_s", "s", 0.25, 1.0, 10, 1, lambda system: system.frames(frames)),
    )
    try:
        for name, unit, bar, scale, rounds, calls, call in measured:
            seconds = _interleaved(name, systems, call, 2 if quick else rounds, calls)
            yield from _rows(name, unit, bar, scale, seconds, quick)
    finally:
        for system in systems:
            system.close()


def _interleaved(name: str, systems: list, call: Callable, rounds: int, calls: int) -> dict[str, list[float]]:
    """The seconds of each call by system. Systems take turns; each one's first turn does not count."""
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    for number in tqdm(range(rounds + 1), desc=name):
        for system in systems:
            times = [_timed(call, system) for _ in range(calls)]
            if number:
                seconds[system.name] += times
    return seconds


def _timed(call: Callable, system) -> float:
    """Seconds until the caller has the answer and has touched every page of it, without freeing it."""
    start = time.perf_counter()
    answer = call(system)
    if answer is not None:
        touch(answer)
    return time.perf_counter() - start


def touch(answer: Tensor | np.ndarray) -> None:
    """Reads every page of an answer, which is all ones."""
    values = np.asarray(answer).reshape(-1)[::PAGE]
    assert values.sum() == len(values), "the answer is not all ones"


def _rows(name: str, unit: str, bar: float, scale: float, seconds: dict[str, list[float]], quick: bool):
    ours, *others = ((system, median(times) * scale) for system, times in seconds.items())
    runs = len(seconds[ours[0]])
    spread = sorted(seconds[ours[0]])
    best, worst = (round(spread[int(share * (runs - 1))] * scale, 4) for share in (0.1, 0.9))
    context = context_of(quick, ranks=2, runs=runs, p10=best, p90=worst)
    yield Row(name=name, value=ours[1], unit=unit, better="lower", baseline=bar, context=context)
    for system, figure in others:
        context = context_of(quick, ranks=2, runs=runs, **{f"{system}_{unit}": round(figure, 4)})
        ratio = figure / ours[1]
        yield Row(name=f"{name}_vs_{system}", value=ratio, unit="times", better="higher", baseline=1.0, context=context)
