"""The base class of all specs, and checks of field values."""

from __future__ import annotations

import os
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, get_type_hints

import msgspec
from msgspec import Struct
from msgspec.structs import force_setattr

MAX_PATH = 4096  # characters (limits.h)


class Spec(Struct, frozen=True, kw_only=True):
    """A frozen description whose fields have their declared types. Equivalent values (a list for a tuple, an int for a
    float, a Path for a str, numpy's numbers) are converted. Raises ValueError for anything else."""

    def __post_init__(self):
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            try:
                typed = msgspec.convert(_plain(value), kind)
            except msgspec.ValidationError as error:
                raise ValueError(f"{name} is {value!r}. {str(error).replace('null', 'None')}.") from None
            force_setattr(self, name, typed)


def _plain(value: Any) -> Any:
    """Converts paths to str and numpy's numbers to Python's, as messages can only carry these."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if type(value) not in (bool, int, float) and isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


@lru_cache(maxsize=None)
def _types(spec: type[Spec]) -> dict[str, type]:
    return get_type_hints(spec)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it can be one of {', '.join(choices)}.")


def require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}.")


def require_multiple(name: str, value: int, step: int, offset: int, highest: int) -> None:
    """Raises ValueError, with the nearest valid values, if `value` is not n * step + offset, greater than 0 and at most
    `highest`."""
    lowest = offset or step
    if value % step == offset and lowest <= value <= highest:
        return
    down = min(max(lowest, (value - offset) // step * step + offset), highest)
    near = f"The nearest are {down} and {down + step}." if down < highest else f"The nearest is {down}."
    what = f"{step}n+{offset}" if offset else f"a multiple of {step}"
    raise ValueError(f"{name} is {value}; it must be {what}, from {lowest} to {highest}. {near}")


def make_absolute(spec: Spec, *names: str) -> None:
    """Makes paths absolute, as ranks run in another working directory. Raises ValueError for an impossible path."""
    for name in names:
        path = getattr(spec, name)
        if path is not None:
            if not 0 < len(path) <= MAX_PATH or "\0" in path:
                shown = repr(path) if len(path) <= MAX_PATH else f"of {len(path)} characters"
                raise ValueError(f"{name} is {shown}, which is not a valid path. Give the path of a file or folder.")
            if any("\ud800" <= character <= "\udfff" for character in path):
                raise ValueError(f"{name} is {path!r}, which is not valid UTF-8. Rename the file or folder.")
            force_setattr(spec, name, os.path.abspath(os.path.expanduser(path)))


def require_side(what: str, pixels: int, multiple: int, cure: str = "") -> None:
    """Raises ValueError, with the nearest valid sizes, if a width or height is not a multiple. what: the first words of
    the error, which say what was given. cure: its last sentence."""
    if pixels % multiple:
        down = max(multiple, pixels // multiple * multiple)
        raise ValueError(
            f"{what} it must be a multiple of {multiple}. The nearest are {down} and {down + multiple}. {cure}".rstrip()
        )
