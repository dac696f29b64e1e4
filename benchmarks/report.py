"""Figures of benchmarks: their values, the machine, how they are printed, and what was not measured and why."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Iterable, Iterator, Literal

import msgspec
import psutil
import torch
from ascend_runtime.hardware import cores
from msgspec import Struct


class Row(Struct, frozen=True, kw_only=True):
    """One figure. baseline: the value to reach; context: the conditions."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    baseline: float
    context: dict[str, Any]

    @property
    def holds(self) -> bool:
        return self.value <= self.baseline if self.better == "lower" else self.value >= self.baseline


def context_of(quick: bool, device: str = "cpu", **more) -> dict[str, Any]:
    """The kind of machine and device, the current load, the versions, and `more`."""
    virtual = "hypervisor" in Path("/proc/cpuinfo").read_text()
    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{'virtual' if virtual else 'physical'} {platform.machine()} machine, {memory:.0f} GiB",
        "device": device,
        "cores": cores.usable_cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({name: _version(name) for name in ("torch_npu", "mindiesd")} if device == "npu" else {}),
        **({"quick": True} if quick else {}),
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def to_json(row: Row) -> str:
    return msgspec.json.encode(row).decode() + "\n"


def from_json(line: str) -> Row:
    return msgspec.json.decode(line, type=Row)


def print_table(rows: Iterable[Row]) -> None:
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        sign = "<=" if row.better == "lower" else ">="
        verdict = "holds" if row.holds else "missed"
        print(f"{row.name:{width}}  {row.value:10.4g} {row.unit:7} {sign} {row.baseline:<7g} {verdict}")


def leave_out(what: str, why: object) -> None:
    """Prints that something is not measured, and why."""
    print(f"{what}: left out: {why}", flush=True)


class Failures:
    """Collects failed measurements: prints each immediately, while the others continue."""

    def __init__(self):
        self.names: list[str] = []

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Runs one measurement; prints any exception."""
        try:
            yield
        except Exception as error:
            self.names.append(what)
            print(f"{what}: failed: {type(error).__name__}: {error}", flush=True)

    def exit_if_any(self) -> None:
        if self.names:
            raise SystemExit(f"Not measured because of failures: {', '.join(self.names)}; see above.")
