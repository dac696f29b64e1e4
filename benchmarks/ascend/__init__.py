"""Operators, the VAE, parallel modes and published workloads on a machine with accelerators.

Uses the available device: NPUs, CUDA devices, or the CPU, where everything is tiny and only shows that the benchmark
works.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Iterable, Iterator

from ascend_runtime.hardware import devices, host
from ascend_runtime.hardware.environment import rank_environment

from ..report import Note, Notes, Row, from_json
from . import machine, modes, vae_dtypes, workloads
from .machine import ROOT
from .markdown import markdown
from .published import Workload

CPU_RANKS = 2


def run(quick: bool, models: Path | None = None, only: str | None = None, report: Path | None = None) -> Iterator[Row]:
    """models: the folder that holds the published models as diffusers folders. only: a part of the names of published
    workloads. report: a file for the report, which is printed too, also if the run is interrupted."""
    chosen = workloads.chosen(only)
    if report is not None:
        report.touch()  # a file that cannot be written is an error now, not after hours
    kind = devices.resolve_kind("auto")
    cards = machine.find_cards(kind, devices.count_visible(kind))
    measured = Measured(cards, quick)
    try:
        for row in _measure(measured, quick, models, chosen):
            measured.rows.append(row)
            yield row
    finally:
        measured.write(report)
    measured.notes.exit_if_any_failed()


@dataclass
class Measured:
    """What was measured on which cards, and what was not."""

    cards: machine.Cards
    quick: bool
    rows: list[Row] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)

    def write(self, file: Path | None) -> None:
        run = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "options": "--quick" if self.quick else ""}
        text = markdown(run | machine.describe(self.cards), self.rows, self.notes)
        print(f"\n{text}", flush=True)
        if file is not None:
            file.write_text(text)


def _measure(measured: Measured, quick: bool, models: Path | None, chosen: Iterable[Workload]) -> Iterator[Row]:
    cards, notes = measured.cards, measured.notes
    ranks = CPU_RANKS if cards.kind == "cpu" else cards.count
    yield from _operators(cards.kind, quick, notes)
    yield from vae_dtypes.measure(cards, quick, notes)
    yield from modes.measure(cards.kind, ranks, quick, notes)
    yield from workloads.measure(chosen, cards, models, quick, notes)


def _operators(kind: str, quick: bool, notes: Notes) -> Iterator[Row]:
    """In a separate process: it has the ranks' environment, an operator may crash it, and it leaves the card empty."""
    with tempfile.TemporaryDirectory() as folder:
        rows, others = (Path(folder) / name for name in ("rows.jsonl", "notes.jsonl"))
        rows.touch()
        others.touch()
        command = [sys.executable, "-m", "benchmarks.ascend.operators", kind, folder, *(["--quick"] if quick else [])]
        with notes.noted("operators"):
            environment = rank_environment(kind, os.environ, {})
            if kind == "npu":
                host.require_npu(environment)
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
        notes.found += [from_json(line, Note) for line in others.read_text().splitlines()]
        yield from map(from_json, rows.read_text().splitlines())
