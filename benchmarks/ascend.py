"""Operators, parallel modes and published workloads on a machine with accelerators.

Uses the available device: NPUs, CUDA devices, or the CPU, where everything is tiny and only shows that the benchmark
works.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator

from ascend_runtime.hardware import devices, host
from ascend_runtime.hardware.environment import rank_environment

from . import modes, workloads
from .report import Failures, Row, from_json

ROOT = Path(__file__).resolve().parent.parent
CPU_RANKS = 2


def run(quick: bool, models: Path | None = None) -> Iterator[Row]:
    """models: the folder that holds the published models as diffusers folders."""
    kind = devices.resolve_kind("auto")
    cards = CPU_RANKS if kind == "cpu" else devices.count_visible(kind)
    failures = Failures()
    yield from _operators(kind, quick, failures)
    yield from modes.measure(kind, cards, quick, failures)
    yield from workloads.measure(kind, cards, models, quick, failures)
    failures.exit_if_any()


def _operators(kind: str, quick: bool, failures: Failures) -> Iterator[Row]:
    """In a separate process: it has the ranks' environment, an operator may crash it, and it leaves the card empty."""
    environment = rank_environment(kind, os.environ, {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.touch()
        command = [sys.executable, "-m", "benchmarks.operators", kind, str(file), *(["--quick"] if quick else [])]
        with failures.noted("operators"):
            if kind == "npu":
                host.require_npu(environment)
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
        yield from map(from_json, file.read_text().splitlines())
