"""Files that a user names: read whole, up to a size, as UTF-8."""

from __future__ import annotations

from pathlib import Path

from . import QueueError


def read_text(path: Path, what: str, largest: int) -> str:
    """The text of a file, or of a pipe, without a byte-order mark. what: as messages name it. Raises QueueError."""
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise QueueError(f"Cannot read {what}: {getattr(error, 'strerror', None) or error}. Check the path.") from None
    if len(content) > largest:
        raise QueueError(f"Cannot read {what}: it has more than {largest >> 20} MiB, the most that is read.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise QueueError(f"Cannot read {what}: it is no text in UTF-8, for one in line {number} (byte "
                         f"0x{content[error.start]:02x}). Save it in UTF-8.") from None
