"""Checks of free disk space, and of how fast models are read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...hardware.host import HostFault
from . import comfyui, model_files
from .findings import Finding, error, fine, warning
from .surroundings import Surroundings

_FULL, _LITTLE = 10**9, 5 * 10**9  # bytes; videos, logs and compiled operators take some GB
_SAMPLE, _PART, _MOST_SECONDS = 64 * 2**20, 2**20, 2.0  # bytes read of a file, at a time, and seconds at most
_SLOW = 200e6  # bytes a second: then 68 GB, as Wan 2.2 A14B with its text encoder, take six minutes
_SMALLEST_SAMPLE = 8 * 2**20  # bytes of a file; less says nothing about a disk


def _space(around: Surroundings) -> Iterator[Finding]:
    """The space where videos, logs, temporary files and compiled operators are written."""
    comfy = comfyui.folder_of_comfyui(around)
    home, temporary = around.environ.get("HOME"), around.environ.get("TMPDIR") or tempfile.gettempdir()
    places = [*([comfy / "output"] if comfy else []), Path(temporary), *([Path(home)] if home else [])]
    seen, findings = set(), []
    for place in places:
        try:
            device, free = place.stat().st_dev, around.size_of(place).free
        except OSError:
            continue  # ComfyUI makes its output folder; a user of a service may have no home
        if device not in seen:
            seen.add(device)
            findings.append(_space_of(place, free))
    yield from findings


def _space_of(place: Path, free: int) -> Finding:
    if free >= _LITTLE:
        return fine("disk space", f"{free / 1e9:.0f} GB are free in {place}")
    fault = HostFault(
        "AV-1316", f"{free / 1e9:.1f} GB are free on the disk of {place}.",
        "Remove what is not needed (`du -xh --max-depth 1 /`), or put the folder on another disk (ComfyUI's "
        "--output-directory, TMPDIR).",
    )  # fmt: skip
    return (error if free < _FULL else warning)("disk space", fault)


def _speed(around: Surroundings) -> Iterator[Finding]:
    """How fast the largest model file is read from its disk: a sample from its middle."""
    folders, _ = comfyui.model_folders(around)
    found = model_files.model_files_in(around, folders).files if folders else {}
    path = max(found, key=found.__getitem__, default=None)
    if path is None or found[path] < _SMALLEST_SAMPLE:
        yield fine("disk speed", "not measured: there is no large model file")
        return
    try:
        rate = reading_rate(around, path, found[path])
    except OSError:
        return  # the check of model files reports it
    if rate >= _SLOW:
        yield fine("disk speed", f"{path.name} is read with {rate / 1e6:.0f} MB/s")
    else:
        yield warning("disk speed", HostFault(
            "AV-1112", f"{path} is read with {rate / 1e6:.0f} MB/s: Wan 2.2 A14B with its text encoder, 68 GB, then "
            f"takes {68e9 / rate / 60:.0f} minutes to load.",
            "Put models on a local SSD. On a network share, check its load and its mount options.",
        ))  # fmt: skip


def reading_rate(around: Surroundings, path: Path, size: int) -> float:
    """Bytes a second. Asks the kernel first to forget what it has of the sample, which it may refuse for a file that is
    in use: then the rate is that of its memory. Raises OSError."""
    start = max(0, (size - _SAMPLE) // 2) // _PART * _PART
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, _SAMPLE, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        read, begun = 0, around.clock()
        while read < _SAMPLE and (part := file.read(_PART)):
            read += len(part)
            if around.clock() - begun > _MOST_SECONDS:
                break
        return read / max(1e-9, around.clock() - begun)


DISK_CHECKS = (_space, _speed)
