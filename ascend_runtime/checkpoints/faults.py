"""What is wrong with a file, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_NAMES = 8  # how many names of tensors an error lists


def listed(faults: dict[str, list[str]]) -> str:
    """Names of tensors by what is wrong with them, in words; the first ones of each fault."""
    return "; ".join(
        f"{len(names)} {fault}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
        for fault, names in faults.items()
        if names
    )


@contextmanager
def usable(file: Path, what: str) -> Iterator[None]:
    """Around what is made of a file's own words by code, perhaps a library's, that trusts them.

    Whatever that ends in becomes a ValueError that names the file, and what of it cannot be used.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else type(error).__name__
        why = ": ".join(filter(None, (kind, *str(error).splitlines()[:1])))
        raise ValueError(f"{file}: {what} cannot be used ({why}). Download it again.") from error
