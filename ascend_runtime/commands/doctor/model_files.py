"""Checks of model files, by their names, sizes and headers: no weights are read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...checkpoints.bounded import MAX_JSON_BYTES, parse_json
from ...hardware.host import HostFault
from . import comfyui
from .findings import Finding, error, fine, warning
from .surroundings import Surroundings

_SUFFIXES = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".distcp")
# Names by which download tools mark what is not finished: aria2, browsers, huggingface_hub, ModelScope, wget, curl.
_UNFINISHED = (".aria2", ".part", ".partial", ".incomplete", ".crdownload", ".download", "._____temp")
_POINTER = b"version https://git-lfs.github.com/spec"
_PAGES = (b"<!doctype", b"<html")
_MOST_ENTRIES, _MOST_HEADERS, _MOST_SECONDS = 50_000, 1_000, 3.0
_MOST_NAMED = 8  # faults of one kind that are listed one by one
_HEADER_BYTES = 2 * MAX_JSON_BYTES  # as many as the loaders take


@dataclass
class ModelFiles:
    """What folders contain. complete: whether all of it was seen within the bounds."""

    files: dict[Path, int] = field(default_factory=dict)  # path -> bytes
    unfinished: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)  # pipes and devices, whose reading may never end
    complete: bool = True


def model_files_in(around: Surroundings, folders: list[Path]) -> ModelFiles:
    """The model files in folders and their folders, within bounds of entries and time. Follows links, as ComfyUI does,
    and no folder twice."""
    found, seen, entries, deadline = ModelFiles(), set(), 0, around.clock() + _MOST_SECONDS
    waiting = list(reversed(folders))
    while waiting:
        folder = waiting.pop()
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as scanned:
                for entry in scanned:
                    entries += 1
                    if entries > _MOST_ENTRIES or around.clock() > deadline:
                        found.complete = False
                        return found
                    _sort(entry, found, waiting)
        except OSError:
            found.unreadable.append(folder)
    return found


def _sort(entry: os.DirEntry, found: ModelFiles, waiting: list[Path]) -> None:
    path = Path(entry.path)
    try:
        if entry.is_dir():
            waiting.append(path)
        elif entry.name.lower().endswith(_UNFINISHED):
            found.unfinished.append(path)
        elif entry.name.lower().endswith(_SUFFIXES):
            state = entry.stat()  # of a link's target; raises if that is gone
            if stat.S_ISREG(state.st_mode):
                found.files[path] = state.st_size
            else:
                found.special.append(path)
    except OSError:
        found.unreadable.append(path)


def _files(around: Surroundings) -> Iterator[Finding]:
    folders, faults = comfyui.model_folders(around)
    yield from (error("model folders", fault) for fault in faults)
    if not folders:
        if not faults:
            yield fine("model folders", "none was given, and no ComfyUI is around; name some by --models")
        return
    found = model_files_in(around, folders)
    faulty = list(_all_faults(around, found))
    yield from faulty
    if not found.files and not faults and not faulty:
        yield warning("model files", HostFault(
            "AV-1705", f"{', '.join(map(str, folders[:3]))}: there is no model file.",
            "docs/models.md has a download line for each model, and the folder that it belongs into.",
        ))  # fmt: skip
    elif not faulty and not faults:
        size = sum(found.files.values()) / 1e9
        rest = "" if found.complete and len(found.files) <= _MOST_HEADERS else ", of which some were not looked at"
        yield fine("model files", f"{len(found.files)} files, {size:.1f} GB, in {len(folders)} folder(s){rest}")


def _all_faults(around: Surroundings, found: ModelFiles) -> Iterator[Finding]:
    for name in _named(found.unreadable):
        yield error("model files", HostFault(
            "AV-1314", f"{name} cannot be read.", "Check its permissions, and where its links lead: `ls -lL`."
        ))  # fmt: skip
    for name in _named(found.special):
        yield error("model files", HostFault("AV-1306", f"{name} is a pipe or a device.", "Replace it with the file."))
    for name in _named(found.unfinished):
        yield warning("model files", HostFault(
            "AV-1302", f"{name} belongs to a download that is not finished.",
            "Finish it with the same tool, or remove this file and the one that it belongs to.",
        ))  # fmt: skip
    faults, deadline, looked_at = [], around.clock() + _MOST_SECONDS, 0
    for path, size in list(found.files.items())[:_MOST_HEADERS]:
        if around.clock() > deadline or len(faults) == _MOST_NAMED:
            break
        faults += [error("model files", fault) for fault in _faults_of(path, size)]
        looked_at += 1
    if faults and looked_at < len(found.files):
        rest = f"{faults[-1].found} {len(found.files) - looked_at} other files were not looked at."
        faults[-1] = replace(faults[-1], found=rest)
    yield from faults


def _named(paths: list[Path]) -> list[str]:
    """The first of these by name; the last name says how many others there are."""
    named, others = [str(path) for path in paths[:_MOST_NAMED]], len(paths) - _MOST_NAMED
    return [*named[:-1], f"{named[-1]} (as {others} others)"] if others > 0 else named


def _faults_of(path: Path, size: int) -> Iterator[HostFault]:
    """What is wrong with a file, by its first bytes."""
    again = "Download it again."
    try:
        with path.open("rb", buffering=0) as file:
            first = file.read(len(_POINTER))
            if first.lower().startswith(_PAGES):
                yield HostFault("AV-1304", f"{path} is a web page.", "Accept the licence or log in where it comes "
                                "from, and download it again.")  # fmt: skip
            elif size == 0:
                yield HostFault("AV-1302", f"{path} is empty.", again)
            elif first == _POINTER:
                yield HostFault("AV-1303", f"{path} is a Git LFS pointer, which stands for the file.",
                                "Run `git lfs pull` in its repository, or download the file itself.")  # fmt: skip
            elif path.suffix.lower() in (".safetensors", ".sft") and (why := _header_fault(file, size)):
                yield HostFault("AV-1302", f"{path} is not a complete .safetensors file: {why}.", again)
    except PermissionError:
        yield HostFault("AV-1314", f"{path} cannot be read.", "Check its permissions: `ls -l`.")
    except OSError as failure:
        yield HostFault("AV-1313", f"{path} cannot be read ({failure.strerror}).",
                        "Check the disk or the network share (`dmesg`).")  # fmt: skip


def _header_fault(file, size: int) -> str | None:
    """What is wrong with the header of a .safetensors file (its format: 8 bytes of the header's length, JSON, data)."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(_HEADER_BYTES, size - 8):
        return f"its header is said to have {length} bytes, and the file has {size}"
    try:
        entries = parse_json(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        return "its header is not valid"
    needed = 8 + length + max(ends, default=0)
    return None if size == needed else f"it has {size} bytes of {needed}"


MODEL_CHECKS = (_files,)
