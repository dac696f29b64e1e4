"""Paths in specs and messages, as another machine has them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import force_setattr

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
