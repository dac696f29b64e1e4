"""Formats errors about files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import coded_error

MAX_NAMES = 8  # tensor names that an error lists
MAX_QUOTED = 300  # characters that an error quotes from a file


def printable(text: str) -> str:
    """`text` with escapes for characters that are unsafe to print: control characters (which start the escape sequences
    of terminals), marks that change the writing direction, and lone surrogates."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def shown(words: Any) -> str:
    """Text from a file, as an error quotes it: printable, and of bounded length."""
    words = str(words)
    return printable(words[:MAX_QUOTED]) + ("..." if len(words) > MAX_QUOTED else "")


def list_faults(faults: dict[str, list[str]]) -> str:
    """A text that lists tensor names by their fault: the number and the first names of each."""
    return "; ".join(
        f"{len(names)} {fault}: {', '.join(map(shown, names[:MAX_NAMES]))}{', ...' if len(names) > MAX_NAMES else ''}"
        for fault, names in faults.items()
        if names
    )


@contextmanager
def as_value_error(file: Path, what: str, code: str = "AV-1309") -> Iterator[None]:
    """Turns any exception of the code inside, such as a library that parses untrusted content, into a ValueError.

    The error names the file and `what`, the part of it that cannot be used, and has this code.
    """
    try:
        yield
    except BaseException as error:
        # Libraries in Rust raise PanicException, which is not an Exception, and whose class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "" if isinstance(error, ValueError) else type(error).__name__
        why = ": ".join(filter(None, (kind, *map(shown, str(error).splitlines()[:1]))))
        raise coded_error(code, f"{file}: {what} cannot be used ({why}). Download it again.") from error


def not_readable(path: Path, error: OSError) -> ValueError:
    """The error for a file that the system does not read."""
    if isinstance(error, PermissionError):
        return coded_error("AV-1314", f"{path} cannot be read ({error.strerror}). Check its permissions.")
    if isinstance(error, FileNotFoundError):
        return coded_error("AV-1301", f"{path} cannot be read ({error.strerror}). Was it moved or deleted?")
    return coded_error("AV-1313", f"{path} cannot be read ({error.strerror}). Check the disk or share that it is on.")
