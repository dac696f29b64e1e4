"""Parses the headers of GGUF files (ggml-org/ggml, docs/gguf.md) within bounds.

Magic, version, the numbers of tensors and of fields; then the fields (key, type, value), then each tensor's name, dims
(the last one first), type and offset. Offsets count from the first multiple of the alignment after that. The gguf
package's reader is not used for this: it makes objects of all elements of all arrays, of which a tokenizer has a
million, and an array's length that a file invents makes it run for as long as it says.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ...errors import coded_error
from ..bounded import MAX_DIMS, MAX_NAME_LENGTH, MAX_TENSORS
from ..faults import shown
from ..states import content_state

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_GGUF_HEADER = 64 * 2**20  # that of a Llama with its tokenizer has 8 MB
MAX_FIELDS = 20_000  # a file has less than 100, and one for each tensor that was reshaped
MAX_TEXTS = 2_000_000  # in all arrays; the tokenizer of Llama 3 has 410,000
MAX_ALIGNMENT = 2**16
READ_AHEAD = 2**18
SHAPE_KEY = "comfy.gguf.orig_shape."  # of the field with a tensor's shape before it was stored as a matrix
FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
TYPES = {int(one): one.name for one in GGMLQuantizationType}


@dataclass(frozen=True)
class StoredTensor:
    """kind: its type, as ggml names it. shape: as stored. original: before it was stored as a matrix. start: its first
    byte in the file."""

    kind: str
    shape: tuple[int, ...]
    original: tuple[int, ...]
    start: int

    @property
    def values(self) -> int:
        """The number of neighbours of a row in a block; 1 for numbers."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]][0]

    @property
    def block_bytes(self) -> int:
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.values * self.block_bytes


@dataclass(frozen=True)
class Header:
    """fields: single values, by key. arrays: (bytes, or texts) of a list, by key: its elements' format of `struct`, and
    their bytes; texts are one after the other, each with its length."""

    fields: dict[str, object] = field(default_factory=dict)
    arrays: dict[str, tuple[str, int, bytes]] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def numbers(self, key: str) -> tuple | None:
        """A list of numbers; None: there is no such list."""
        kind, count, content = self.arrays.get(key, ("", 0, b""))
        return struct.unpack(f"<{count}{kind}", content) if kind not in ("", TEXTS) else None

    def texts(self, key: str) -> list[bytes] | None:
        """A list of texts in UTF-8; None: there is no such list."""
        kind, count, content = self.arrays.get(key, ("", 0, b""))
        return list(_texts_in(content, count)) if kind == TEXTS else None


TEXTS = "text"


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises ValueError, which names the file, if it is damaged, cut off or too large.
    Cached until the file changes."""
    return _read(path, content_state(path))


@lru_cache(maxsize=4)
def _read(path: Path, _: tuple) -> Header:
    with path.open("rb", buffering=0) as file:
        source = _Source(path, file)
        try:
            return _header(source, path.stat().st_size)
        except (struct.error, UnicodeDecodeError) as error:
            raise source.damaged(shown(error)) from None


class _Source:
    """The bytes of a header, one after the other."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file
        self._content = bytearray()
        self.at = self._texts = 0

    def take(self, nbytes: int) -> bytes:
        """The next bytes. Raises ValueError if the header ends before, or has more than its bound."""
        end = self.at + nbytes
        self._read_to(end)
        taken = bytes(memoryview(self._content)[self.at : end])
        self.at = end
        return taken

    def _read_to(self, end: int) -> None:
        if end > MAX_GGUF_HEADER:
            raise coded_error(
                "AV-1312", f"{self.path} has a header of more than {MAX_GGUF_HEADER} bytes. Download it again."
            )
        while len(self._content) < end:
            more = self._file.read(max(READ_AHEAD, end - len(self._content)))
            if not more:
                raise coded_error("AV-1302", f"{self.path} ends within its header. Download it again.")
            self._content += more

    def list_of_texts(self, count: int) -> bytes:
        """So many texts, each after its length. Raises ValueError for more texts than all lists may have."""
        self._texts += count
        if self._texts > MAX_TEXTS:
            raise coded_error(
                "AV-1312", f"{self.path} has {self._texts} texts; a model's file has at most {MAX_TEXTS}."
            )
        end = self.at
        for _ in range(count):
            if end + 8 > len(self._content):
                self._read_to(end + 8)
            end += 8 + int.from_bytes(self._content[end : end + 8], "little")
        return self.take(end - self.at)

    def numbers(self, kinds: str) -> tuple:
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))

    def name(self) -> str:
        """A key, or a tensor's name."""
        (length,) = self.numbers("Q")
        if length > MAX_NAME_LENGTH:
            raise self.damaged(f"a name of {length} bytes")
        return self.take(length).decode()

    def text(self) -> bytes:
        (length,) = self.numbers("Q")
        return self.take(length)

    def damaged(self, why: str) -> ValueError:
        return coded_error("AV-1306", f"{self.path} is a GGUF file with a damaged header ({why}). Download it again.")


def _header(source: _Source, size: int) -> Header:
    source.take(len(MAGIC))
    version, tensors, fields = source.numbers("IQQ")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise coded_error(
            "AV-1305",
            f"{source.path} is a GGUF file in big-endian byte order; the supported one is little-endian, in which "
            "models are published.",
        )
    if version not in VERSIONS:
        raise coded_error(
            "AV-1305",
            f"{source.path} is a GGUF file of version {version}; the supported ones are "
            f"{' and '.join(map(str, VERSIONS))}. Use a file of version 3.",
        )
    for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (fields, MAX_FIELDS, "fields")):
        if count > most:
            raise coded_error(
                "AV-1312", f"{source.path} has {count} {what}; a model's file has at most {most}. Download it again."
            )
    made = Header()
    for _ in range(fields):
        key = source.name()
        if key in made.fields or key in made.arrays:
            raise source.damaged(f"the key {shown(key)} twice")
        _read_value(source, key, made)
    infos = [_info(source) for _ in range(tensors)]
    _place(source, made, infos, size)
    return made


def _read_value(source: _Source, key: str, into: Header) -> None:
    kind = _value_type(source)
    if kind is GGUFValueType.STRING:
        into.fields[key] = source.text().decode(errors="replace")
    elif kind is not GGUFValueType.ARRAY:
        (into.fields[key],) = source.numbers(FORMATS[kind])
    else:
        inner = _value_type(source)
        (count,) = source.numbers("Q")
        if inner is GGUFValueType.ARRAY:
            raise source.damaged(f"a list of lists as {shown(key)}")
        if inner is GGUFValueType.STRING:
            into.arrays[key] = TEXTS, count, source.list_of_texts(count)
        else:
            content = source.take(count * struct.calcsize(FORMATS[inner]))
            into.arrays[key] = FORMATS[inner], count, content


def _value_type(source: _Source) -> GGUFValueType:
    (number,) = source.numbers("I")
    if number not in list(GGUFValueType):
        raise source.damaged(f"a value of the unknown type {number}")
    return GGUFValueType(number)


def _texts_in(content: bytes, count: int) -> Iterator[bytes]:
    at = 0
    for _ in range(count):
        length = int.from_bytes(content[at : at + 8], "little")
        yield content[at + 8 : at + 8 + length]
        at += 8 + length


def _info(source: _Source) -> tuple[str, tuple[int, ...], int, int]:
    """(a tensor's name, shape, type, offset)"""
    name = source.name()
    (dims,) = source.numbers("I")
    if dims > MAX_DIMS:
        raise source.damaged(f"{shown(name)} with {dims} dims")
    shape = source.numbers(f"{dims}Q") if dims else ()
    return name, tuple(reversed(shape)), *source.numbers("IQ")


def _place(source: _Source, made: Header, infos: list[tuple[str, tuple[int, ...], int, int]], size: int) -> None:
    """Adds the tensors. Raises ValueError for those that do not lie in the file, one after the other."""
    alignment = made.fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise source.damaged(f"the alignment {shown(str(alignment))}")
    begin, done = -(-source.at // alignment) * alignment, 0
    for name, shape, number, offset in sorted(infos, key=lambda info: info[3]):
        if number not in TYPES:
            raise coded_error(
                "AV-1305",
                f"{source.path} holds {shown(name)} in the unknown type {number} of ggml. Use the model's Q8_0, Q4_K "
                "or F16 form.",
            )
        one = StoredTensor(TYPES[number], shape, _original(source, made, name, shape), begin + offset)
        whole_blocks = one.values == 1 or shape and shape[-1] % one.values == 0
        if name in made.tensors or offset % alignment or offset < done or not whole_blocks:
            raise source.damaged(f"the tensor {shown(name)} {list(shape)} as {one.kind} at {offset}")
        if one.start + one.nbytes > size:
            raise coded_error(
                "AV-1302",
                f"{source.path} is cut off: {shown(name)} ends at byte {one.start + one.nbytes}, the file at {size}. "
                "Download it again.",
            )
        made.tensors[name], done = one, offset + one.nbytes


def _original(source: _Source, made: Header, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    original = made.numbers(f"{SHAPE_KEY}{name}")
    if original is None:
        return shape
    if len(original) > MAX_DIMS or min(original, default=0) < 0 or math.prod(original) != math.prod(shape):
        raise source.damaged(f"{shown(name)} {list(shape)} with the original shape {list(original)[:MAX_DIMS]}")
    return tuple(map(int, original))
