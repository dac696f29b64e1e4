"""Paths in specs and messages, as another machine has them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import force_setattr

from .base import MAX_PATH
from .jobs import ProfileSpec
from .models import DiffusionModelSpec, LoraSpec, TextEncoderSpec, VaeSpec, VisionSpec

# The fields of each spec that are paths.
PATHS: dict[type, tuple[str, ...]] = {
    LoraSpec: ("path",),
    DiffusionModelSpec: ("path", "low_noise_path"),
    TextEncoderSpec: ("path", "path_2", "vision_path", "tokenizer_path", "tokenizer_path_2"),
    VisionSpec: ("path",),
    VaeSpec: ("path",),
    ProfileSpec: ("folder",),
}


def with_paths(value: Any, folders: Mapping[str, str]) -> Any:
    """`value`, a spec or a message with specs, with all paths as another machine has them.

    folders: here -> there, absolute. Of several that a path is in, the innermost counts; a path that is in none stays.
    Folders are compared by their names, so a link is another folder than the one that it leads to. Raises nothing, as
    ranks that map paths differently must go on together: what a spec says was checked where it was made.
    """
    if not folders:
        return value
    return _changed(value, partial(_mapped, {_plain_folder(here): there for here, there in folders.items()}))


def without_paths(value: Any) -> Any:
    """`value` with no paths in it: equal for specs that differ in nothing else."""
    return _changed(value, lambda path: "")


def check_folders(folders: Mapping[str, str]) -> None:
    """Raises ValueError, with the fix, for folders that `with_paths` cannot map."""
    for folder in (*folders, *folders.values()):
        why = _fault(folder)
        if why:
            raise ValueError(f"The folder {folder!r} {why}. Give it in full, such as /data/models.")
    known: dict[str, str] = {}
    for folder in folders:
        other = known.setdefault(_plain_folder(folder), folder)
        if other != folder:
            raise ValueError(f"{other!r} and {folder!r} are the same folder. Keep one of the two.")


def _fault(folder: str) -> str:
    if len(folder) > MAX_PATH:
        return f"has {len(folder)} characters, more than {MAX_PATH}"
    if not folder.startswith("/"):
        return "does not begin with /"
    if ".." in folder.split("/"):
        return "has .. in it"
    if "\0" in folder or any("\ud800" <= character <= "\udfff" for character in folder):
        return "is not valid UTF-8"
    return ""


def _plain_folder(folder: str) -> str:
    """A path without double or trailing slashes, as specs have it."""
    return os.path.normpath("/" + folder.lstrip("/"))


def _mapped(folders: Mapping[str, str], path: str) -> str:
    if not path.startswith("/"):
        return path
    inside = folder = _plain_folder(path)
    while folder not in folders:
        if folder == "/":
            return path
        folder = os.path.dirname(folder)
    rest = inside[len(folder) :].lstrip("/")
    return os.path.join(_plain_folder(folders[folder]), rest) if rest else _plain_folder(folders[folder])


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, or a copy of it, with other paths. A copy is not validated."""
    if isinstance(value, (tuple, list)):
        changed = [_changed(one, change) for one in value]
        return value if all(one is other for one, other in zip(changed, value)) else type(value)(changed)
    if not isinstance(value, Struct):
        return value
    own, copied = PATHS.get(type(value), ()), None
    for name in value.__struct_fields__:
        given = getattr(value, name)
        made = change(given) if name in own and given is not None else _changed(given, change)
        if made is not given:
            copied = copied or copy.copy(value)
            force_setattr(copied, name, made)
    return value if copied is None else copied

