"""What is wrong with a file, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_NAMES = 8  # how many names of tensors an error lists
LONGEST_WORDS = 300  # characters of a file's own words in an error


def printable(text: str) -> str:
    """`text` with all but what stands on a line written out: control characters, such as begin the sequences that
    terminals obey, marks that turn the direction of writing, and halves of characters, which cannot be printed."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def printable_lines(text: str) -> str:
    """The same of a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def shown(words: Any) -> str:
    """What a file says, as an error may quote it: printable, and of bounded length."""
    words = str(words)
    return printable(words[:LONGEST_WORDS]) + ("..." if len(words) > LONGEST_WORDS else "")


def listed(faults: dict[str, list[str]]) -> str:
    """Names of tensors by what is wrong with them, in words; the first ones of each fault."""
    return "; ".join(
        f"{len(names)} {fault}: {', '.join(map(shown, names[:MAX_NAMES]))}{', ...' if len(names) > MAX_NAMES else ''}"
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
    except BaseException as error:
        # Libraries in Rust end in one that is no Exception, nor can its class be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "" if isinstance(error, ValueError) else type(error).__name__
        why = ": ".join(filter(None, (kind, *map(shown, str(error).splitlines()[:1]))))
        raise ValueError(f"{file}: {what} cannot be used ({why}). Download it again.") from error
