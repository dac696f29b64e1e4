"""Checks of ComfyUI: its version, and the folders in which it looks for models."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...hardware.host import HostFault
from .findings import Finding, error, errors_or, fine
from .surroundings import Surroundings

_OLDEST = (0, 3, 48)  # as in pyproject.toml
_NAMED = "COMFYUI_DIR"
_VERSION = "comfyui_version.py"
_EXTRA = "extra_model_paths.yaml"
_MOST_BYTES = 2**20  # of a file of settings
# Kinds of models that the pack's loaders take, by ComfyUI's names.
MODEL_KINDS = (
    "diffusion_models", "unet", "text_encoders", "clip", "clip_vision", "vae", "loras", "checkpoints", "diffusers",
)  # fmt: skip


def folder_of_comfyui(around: Surroundings) -> Path | None:
    """ComfyUI's folder: COMFYUI_DIR, else the one that the pack is in, else the current folder. None without one."""
    named = around.environ.get(_NAMED)
    places = [Path(named)] if named else [around.pack.parent.parent, around.folder]
    return next((place for place in places if (place / "main.py").is_file() and (place / "comfy").is_dir()), None)


def _version(around: Surroundings) -> Iterator[Finding]:
    place = folder_of_comfyui(around)
    if place is None:
        named = around.environ.get(_NAMED)
        faults = [HostFault("AV-1702", f"{_NAMED} is {named!r}, which is not a ComfyUI's folder.",
                            f"Set {_NAMED} to the folder with ComfyUI's main.py.")] if named else []  # fmt: skip
        yield from errors_or("ComfyUI", faults, f"none around the pack; set {_NAMED} to check one")
        return
    text = _start_of(place / _VERSION)
    found = re.search(r"""__version__\s*=\s*["'](\d+)\.(\d+)\.(\d+)""", text)
    number = tuple(map(int, found.groups())) if found else None
    if number is None or number < _OLDEST:
        has = "has no version" if number is None else f"is {'.'.join(map(str, number))}"
        yield error("ComfyUI", HostFault(
            "AV-1701", f"The ComfyUI in {place} {has}; the pack needs {'.'.join(map(str, _OLDEST))} or newer.",
            "Update it (`git pull`, then `pip install -r requirements.txt`, or ComfyUI-Manager).",
        ))  # fmt: skip
    else:
        yield fine("ComfyUI", f"{'.'.join(map(str, number))} in {place}")


def model_folders(around: Surroundings) -> tuple[list[Path], list[HostFault]]:
    """The folders of models: the user's, else ComfyUI's and those of its extra_model_paths.yaml; and what is wrong
    with that file."""
    if around.models:
        return list(around.models), []
    place = folder_of_comfyui(around)
    if place is None:
        return [], []
    own = [folder for kind in MODEL_KINDS if (folder := place / "models" / kind).is_dir()]
    extra, faults = _extra_folders(place / _EXTRA)
    return own + extra, faults


def _extra_folders(file: Path) -> tuple[list[Path], list[HostFault]]:
    if not file.is_file():
        return [], []
    cure = "Correct it by extra_model_paths.yaml.example next to it; ComfyUI does not start with it."
    try:
        import yaml

        groups = yaml.safe_load(_start_of(file))
        folders = [one for group in groups.values() if group is not None for one in _folders_in(group, file.parent)]
    except ImportError:
        return [], []  # ComfyUI requires it, so this Python is not ComfyUI's
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as failure:
        why = " ".join(str(failure).split())[:200]
        return [], [HostFault("AV-1703", f"{file} cannot be used ({why}).", cure)]
    missing = [folder for folder in folders if not folder.is_dir()]
    faults = [HostFault("AV-1704", f"{file} names {folder}, which is not a folder that can be read.",
                        "Create or mount it, or take it out of the file.") for folder in missing]  # fmt: skip
    return [folder for folder in folders if folder not in missing], faults


def _folders_in(group: dict, place: Path) -> Iterator[Path]:
    """The folders of a group of extra_model_paths.yaml, as ComfyUI reads them (its utils/extra_config.py)."""
    base = Path(os.path.expandvars(os.path.expanduser(group.get("base_path") or "")))
    for kind, text in group.items():
        if kind in MODEL_KINDS:
            yield from (place / base / line.strip() for line in text.split("\n") if line.strip())


def _start_of(file: Path) -> str:
    """The start of a small file; empty if it cannot be read."""
    try:
        with file.open(errors="replace") as opened:
            return opened.read(_MOST_BYTES)
    except OSError:
        return ""


COMFYUI_CHECKS = (_version,)
