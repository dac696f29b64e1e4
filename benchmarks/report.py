"""A measured figure, where it was measured, and how it is shown."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Iterable, Literal

import msgspec
import psutil
import torch
from msgspec import Struct


class Row(Struct, frozen=True, kw_only=True):
    """One figure. baseline: what it must be at least as good as; context: what it hangs on."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    baseline: float
    context: dict[str, Any]

    @property
    def holds(self) -> bool:
        return self.value <= self.baseline if self.better == "lower" else self.value >= self.baseline


def context_of(quick: bool, **more) -> dict[str, Any]:
    """The kind of machine and its load now, the versions, and `more`."""
    virtual = "hypervisor" in Path("/proc/cpuinfo").read_text()
    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{'virtual' if virtual else 'physical'} {platform.machine()} machine, {memory:.0f} GiB, CPU alone",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({"quick": True} if quick else {}),
        **more,
    }


def to_json(row: Row) -> str:
    return msgspec.json.encode(row).decode() + "\n"


def print_table(rows: Iterable[Row]) -> None:
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        sign = "<=" if row.better == "lower" else ">="
        verdict = "holds" if row.holds else "missed"
        print(f"{row.name:{width}}  {row.value:10.3f} {row.unit:7} {sign} {row.baseline:<7g} {verdict}")
