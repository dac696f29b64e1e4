"""Figures of benchmarks: their values and conditions, what was not measured and why, and how these are printed."""

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
    """One figure. baseline: the value to reach; context: the conditions, with `not_compared` if the baseline was
    reached under others."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    baseline: float
    context: dict[str, Any]

    @property
    def holds(self) -> bool:
        return self.value <= self.baseline if self.better == "lower" else self.value >= self.baseline

    @property
    def verdict(self) -> str:
        if "not_compared" in self.context:
            return "not compared"
        return "holds" if self.holds else "missed"


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
        **({name: version(name) for name in ("torch_npu", "mindiesd")} if device == "npu" else {}),
        **({"quick": True} if quick else {}),
        **more,
    }


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def to_json(row: Struct) -> str:
    return msgspec.json.encode(row).decode() + "\n"


def from_json(line: str, kind: type[Struct] = Row) -> Struct:
    return msgspec.json.decode(line, type=kind)


def print_table(rows: Iterable[Row]) -> None:
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        print(f"{row.name:{width}}  {row.value:10.4g} {row.unit:7} {bar(row):10} {row.verdict}")


def bar(row: Row) -> str:
    return f"{'<=' if row.better == 'lower' else '>='} {row.baseline:g}"


# What is not measured


class Note(Struct, frozen=True, kw_only=True):
    """Something that was not measured. failed: it was tried."""

    what: str
    why: str
    failed: bool = False


class Notes:
    """Collects what is not measured: prints each immediately, while other measurements continue.

    file: gets each as a line of JSON, for the process that started this one.
    """

    def __init__(self, file: Path | None = None):
        self.found: list[Note] = []
        self._file = file

    @property
    def failures(self) -> list[str]:
        return [note.what for note in self.found if note.failed]

    def leave_out(self, what: str, why: object) -> None:
        self.add(Note(what=what, why=str(why)))

    def add(self, note: Note) -> None:
        self.found.append(note)
        print(f"{note.what}: {'failed' if note.failed else 'left out'}: {note.why}", flush=True)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(to_json(note))

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Runs one measurement; notes any exception."""
        try:
            yield
        except Exception as error:
            self.add(Note(what=what, why=f"{type(error).__name__}: {error}", failed=True))

    def exit_if_any_failed(self) -> None:
        if self.failures:
            raise SystemExit(f"Not measured because of failures: {', '.join(self.failures)}; see above.")
