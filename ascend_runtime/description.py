"""The base of descriptions: frozen, and of the types that their fields declare."""

from __future__ import annotations

import os
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, get_type_hints

import msgspec
from msgspec import Struct
from msgspec.structs import force_setattr


class Spec(Struct, frozen=True, kw_only=True):
    """A description. Its fields have their declared types: what stands for the same value (a list for a tuple, an int
    for a float, a Path for a str, numpy's numbers) is converted. Raises ValueError for anything else."""

    def __post_init__(self):
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            try:
                typed = msgspec.convert(_plain(value), kind)
            except msgspec.ValidationError as error:
                raise ValueError(f"{name} is {value!r}. {str(error).replace('null', 'None')}.") from None
            force_setattr(self, name, typed)


def _plain(value: Any) -> Any:
    """A path as a str, and numpy's numbers as Python's, which messages can carry."""
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
