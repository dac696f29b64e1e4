"""How large a file may be that says what to read, and how it is read: before anything is made of it, so that no file
takes more time or memory than its kind can need. What a file names is checked here as well."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .faults import shown

LONGEST_JSON = 8 * 2**20  # bytes; a 14B model's index and msModelSlim's description of it have less than 1 MB
MOST_BRACKETS = 2_000_000  # of JSON: each opens a list or an object, the smallest of which takes 30 times its text
LONGEST_NUMBER = 40  # digits of a whole number; an offset in a file has 20 at most
MOST_TENSORS = 20_000  # of a file; Wan's 14B in 8 bits has 3,300, all components of a model in one file less than 5,000
LONGEST_NAME = 256  # characters of a tensor's name; those of published LoRAs have up to 150
MOST_DIMS = 8  # of a tensor


def read_bounded(path: Path, most: int = LONGEST_JSON) -> bytes:
    """All of a file. Raises ValueError, which names it, where it is no regular file (a pipe would wait for ever), is
    empty (as devices and what /proc makes up seem to be), has more than `most` bytes, or may not be read."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{path} is no regular file. Put the file itself in its place.")
        if state.st_size == 0:
            raise ValueError(f"{path} is empty (0 bytes). Download it again.")
        if state.st_size > most:
            raise ValueError(f"{path} has {state.st_size} bytes; a file of its kind has at most {most}. Is it another?")
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). May you read it?") from None


def parse_json(content: bytes | str) -> Any:
    """What JSON says. Raises ValueError where it is none, nests too deep, opens too many lists and objects, or has a
    number of too many digits or none that is finite."""
    brackets = sum(content.count(one if isinstance(content, bytes) else one.decode()) for one in (b"[", b"{"))
    if brackets > MOST_BRACKETS:
        raise ValueError(f"it opens {brackets} lists and objects")
    try:
        return json.loads(content, parse_int=_whole_number, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise ValueError("its lists and objects nest too deep") from None


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:  # int() takes the square of their number in time
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {shown(text)}, which is not finite")
    return number


def read_json(path: Path, again: str = "Download it again.") -> dict:
    """The JSON object in a file. Raises ValueError where there is none; again: what to do then."""
    content = read_bounded(path)
    try:
        said = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({shown(error)}). {again}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no JSON object. {again}")
    return said


def plain_file_name(name: Any) -> bool:
    """Whether a name that a file gives is that of a file or folder next to it, and leads nowhere else."""
    return (
        isinstance(name, str) and 0 < len(name) <= 255 and name not in (".", "..") and name.isprintable()
        and not {"/", "\\"} & set(name)
    )  # fmt: skip


def check_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where a file's tensors are too many, or one has a name or shape that no tensor has."""
    check_count(path, shapes)
    for name, shape in shapes.items():
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"{path} holds a tensor '{shown(name)}', which is no name of one. Download it again.")
        if len(shape) > MOST_DIMS or not all(0 <= size < 2**63 for size in shape):
            raise ValueError(f"{path} holds {name} with {len(shape)} dims, which is no tensor's. Download it again.")


def check_count(path: Path, names: Iterable) -> None:
    """Raises ValueError for more tensors than a model's file has."""
    count = sum(1 for _ in names)
    if count > MOST_TENSORS:
        raise ValueError(f"{path} holds {count} tensors; a model's file has at most {MOST_TENSORS}. Is it another?")
