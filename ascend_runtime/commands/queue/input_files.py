"""Reads a user's input files as UTF-8, up to a maximum size."""

from __future__ import annotations

from pathlib import Path

from . import QueueError


def read_text(path: Path, what: str, largest: int) -> str:
    """The text of a file or a pipe, without a byte-order mark. what: its name in errors. Raises QueueError."""
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise QueueError(f"Cannot read {what}: {getattr(error, 'strerror', None) or error}. Check the path.") from None
    if len(content) > largest:
        raise QueueError(f"Cannot read {what}: it has more than {largest >> 20} MiB. Make it smaller.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise QueueError(f"Cannot read {what}: it is not valid UTF-8, first in line {number} (byte "
                         f"0x{content[error.start]:02x}). Save it in UTF-8.") from None
