"""Seconds to load a checkpoint that is not in the page cache, against reading its files once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Callable, Iterator

from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime

from .report import Row, context_of

RANKS, ROUNDS = 2, 3
BAR = 1.3
CHUNK = 16 * 2**20  # bytes per read call


def run(model: DiffusionModelSpec, files: list[Path], quick: bool) -> Iterator[Row]:
    """Two ranks, each with all weights or with a shard of them; each load follows a read of the same files."""
    for name, fsdp in (("cold_vs_read", False), ("cold_vs_read_fsdp", True)):
        parallel = ParallelSpec(ranks=RANKS, fsdp=fsdp)
        with Runtime(parallel, device="cpu") as runtime:
            runtime.load(model=model, parallel=parallel)  # loads what the first job needs
            rounds = [_round(runtime, model, parallel, files) for _ in range(1 if quick else ROUNDS)]
        context = context_of(
            quick,
            ranks=RANKS,
            gigabytes=round(sum(file.stat().st_size for file in files) / 1e9, 3),
            read_s=[round(read, 2) for read, _ in rounds],
            load_s=[round(load, 2) for _, load in rounds],
        )
        yield Row(name=f"load.{name}.{RANKS}", value=median(load / read for read, load in rounds), unit="times",
                  better="lower", baseline=BAR, context=context)  # fmt: skip


def _round(runtime: Runtime, model: DiffusionModelSpec, parallel: ParallelSpec, files: list[Path]):
    runtime.free()
    read = _seconds(lambda: _read(files), files)
    return read, _seconds(lambda: runtime.load(model=model, parallel=parallel), files)


def _seconds(work: Callable[[], object], files: list[Path]) -> float:
    """Seconds of `work`, with none of the files in the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # unwritten pages would stay in the page cache
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
