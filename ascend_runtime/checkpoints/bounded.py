"""Reads small files within bounds, and checks tensor names and shapes, before anything is allocated for them.

So no file can take more time or memory than a valid file of its kind needs.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import coded_error
from .faults import not_readable, shown

MAX_JSON_BYTES = 8 * 2**20  # a 14B model's index and msModelSlim's description take less than 1 MB
MAX_BRACKETS = 2_000_000  # opening brackets in JSON: an empty list or object takes 30 times the memory of its text
MAX_DIGITS = 40  # of an integer; an offset in a file has at most 20
MAX_TENSORS = 20_000  # in a file; Wan 14B in 8 bits has 3,300, all components of a model in one file less than 5,000
MAX_NAME_LENGTH = 256  # characters of a tensor's name; names in published LoRAs have up to 150
MAX_DIMS = 8  # of a tensor


def read_bounded(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file. Raises ValueError, which names the file, if it is not a regular file (reading a pipe may
    block forever), is empty (as devices and files in /proc appear), has more than `most` bytes, or is not readable."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise coded_error("AV-1306", f"{path} is not a regular file. Replace it with the file itself.")
        if state.st_size == 0:
            raise coded_error("AV-1302", f"{path} is empty (0 bytes). Download it again.")
        if state.st_size > most:
            raise coded_error(
                "AV-1312", f"{path} has {state.st_size} bytes; such a file has at most {most}. Is it another file?"
            )
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise not_readable(path, error) from None


def parse_json(content: bytes | str) -> Any:
    """The content of JSON. Raises ValueError if it is invalid, nests too deeply, has too many lists and objects, or has
    a number that is not finite or has too many digits."""
    brackets = sum(content.count(one if isinstance(content, bytes) else one.decode()) for one in (b"[", b"{"))
    if brackets > MAX_BRACKETS:
        raise coded_error("AV-1312", f"it has {brackets} lists and objects, more than {MAX_BRACKETS}")
    try:
        return json.loads(content, parse_int=_whole_number, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise coded_error("AV-1312", "its lists and objects nest too deeply") from None


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # int() takes time quadratic in the number of digits
        raise coded_error("AV-1312", f"it has a number of {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {shown(text)}, which is not finite")
    return number


def read_json(path: Path, advice: str = "Download it again.") -> dict:
    """The JSON object in a file. Raises ValueError if there is none. advice: what the user can do then."""
    content = read_bounded(path)
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise coded_error("AV-1309", f"{path} is not JSON ({shown(error)}). {advice}") from None
    if not isinstance(parsed, dict):
        raise coded_error("AV-1309", f"{path} does not hold a JSON object. {advice}")
    return parsed


def plain_file_name(name: Any) -> bool:
    """Whether a name given in a file is a plain name of a file or folder next to it, without a path."""
    return (
        isinstance(name, str) and 0 < len(name) <= 255 and name not in (".", "..") and name.isprintable()
        and not {"/", "\\"} & set(name)
    )  # fmt: skip


def check_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a file has too many tensors, or a tensor has an impossible name or shape."""
    check_count(path, shapes)
    for name, shape in shapes.items():
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise coded_error(
                "AV-1312", f"{path} holds a tensor with the invalid name '{shown(name)}'. Download it again."
            )
        if len(shape) > MAX_DIMS or not all(0 <= size < 2**63 for size in shape):
            raise coded_error(
                "AV-1312", f"{path} holds {name} with an invalid shape of {len(shape)} dims. Download it again."
            )


def check_count(path: Path, names: Iterable) -> None:
    """Raises ValueError for more tensors than the file of a model has."""
    count = sum(1 for _ in names)
    if count > MAX_TENSORS:
        raise coded_error(
            "AV-1312", f"{path} holds {count} tensors; a model's file has at most {MAX_TENSORS}. Is it another file?"
        )
