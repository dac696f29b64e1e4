"""Reads GGUF files, as they hold transformers for video and their text encoders."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ...errors import coded_error
from ..faults import shown
from ..renaming import TOKENIZER_MODEL
from .gguf_header import Header, StoredTensor, read_header
from .gguf_names import heads_turned, name_in_network
from .gguf_tokenizer import sentencepiece_model
from .parts import Slices, Stored, full_slices, read_stored

NUMBER_TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
TEXTS_SHOWN = 200  # characters of a field in the file's metadata


class GgufFile:
    """See tensor_file.TensorFile. Tensors have the names, the shapes and the order of rows that their networks have
    in transformers or by their authors; the sentencepiece model of a T5's tokenizer is a tensor of bytes.

    A tensor in blocks has the dtype uint8: `read` gives the blocks of whole rows, or of a part of them that begins and
    ends with a block, as bytes [rows, bytes]; its shape is that of the numbers.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> GgufFile:
        self._header = read_header(self.path)
        self._tensors = _renamed(self.path, self._header)
        self.header = {key: str(value)[:TEXTS_SHOWN] for key, value in self._header.fields.items()}
        self.shapes = {name: one.original for name, (one, _) in self._tensors.items()}
        self._tokenizer = sentencepiece_model(self.path)
        if self._tokenizer is not None:
            self.shapes[TOKENIZER_MODEL] = (len(self._tokenizer),)
        self._file = self.path.open("rb", buffering=0)
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    @property
    def kinds(self) -> dict[str, str]:
        """ggml's type of each tensor that is stored in blocks, by name."""
        return {name: one.kind for name, (one, _) in self._tensors.items() if one.kind not in NUMBER_TYPES}

    def reshaped(self, name: str) -> bool:
        """Whether a tensor in blocks was stored as a matrix of another shape; only the whole of it can be read."""
        return self._tensors[name][0].shape != self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name == TOKENIZER_MODEL else NUMBER_TYPES.get(self._tensors[name][0].kind, torch.uint8)

    def read(self, name: str, part: Slices | None = None, into: Tensor | None = None) -> Tensor:
        if name == TOKENIZER_MODEL:
            whole = torch.frombuffer(bytearray(self._tokenizer), dtype=torch.uint8)
            made = whole if part is None else whole[part]
            return made if into is None else into.copy_(made)
        one, heads = self._tensors[name]
        shape, wanted = self._as_bytes(one, part)
        stored = Stored(one.start, shape, NUMBER_TYPES.get(one.kind, torch.uint8))
        if heads is None or not shape:
            return read_stored(self._file, stored, wanted, into)
        made = _in_order(self._file, stored, wanted, heads)
        return made if into is None else into.copy_(made)

    def _as_bytes(self, one: StoredTensor, part: Slices | None) -> tuple[tuple[int, ...], Slices]:
        """(a tensor's shape as it is read, the part of that)"""
        if one.kind in NUMBER_TYPES:
            return one.original, full_slices(one.original) if part is None else part
        *rows, width = one.shape
        if part is None or one.shape != one.original:
            assert part is None or part == full_slices(one.original), (one, part)
            part = full_slices(one.shape)
        *own, last = part
        assert last.start % one.values == last.stop % one.values == 0, (one, part)
        columns = slice(*(edge // one.values * one.block_bytes for edge in (last.start, last.stop)))
        return (*rows, width // one.values * one.block_bytes), (*own, columns)

    def in_rows(self, name: str) -> bool:
        return name == TOKENIZER_MODEL or name not in self.kinds or not self.reshaped(name)

    def mapped(self, name: str, part: Slices | None = None) -> Tensor:
        """Part of a tensor of numbers, as a view of the mapped file."""
        one, heads = self._tensors.get(name, (None, None))
        size = math.prod(self.shapes[name])
        if one is None or one.kind not in NUMBER_TYPES or heads is not None or not size:
            return self.read(name, part)
        dtype = NUMBER_TYPES[one.kind]
        count = one.start // dtype.itemsize + size
        if one.start % dtype.itemsize:
            return self.read(name, part)
        whole = torch.from_file(str(self.path), shared=False, size=count, dtype=dtype)[-size:].view(one.original)
        return whole if part is None else whole[part]


def _renamed(path: Path, header: Header) -> dict[str, tuple[StoredTensor, int | None]]:
    """(a tensor, the number of heads in which its rows lie in another order; None: they do not), by name."""
    made = {}
    for name, one in header.tensors.items():
        try:
            own, heads = name_in_network(name, header.fields), heads_turned(name, header.fields)
        except ValueError as error:
            raise coded_error("AV-1309", f"{path}: {shown(error)} in its header. Download it again.") from None
        if own in made or heads and (not one.shape or one.shape[0] % (2 * heads) or one.shape != one.original):
            raise coded_error(
                "AV-1302", f"{path} gives {shown(name)} the impossible shape {list(one.shape)}. Download it again."
            )
        made[own] = one, heads
    return made


def _in_order(file, stored: Stored, part: Slices, heads: int) -> Tensor:
    """A part of a tensor, whose rows lie interleaved in each head. Reads whole heads."""
    rows, *rest = part
    size = stored.shape[0] // heads
    first, last = rows.start // size, -(-rows.stop // size)
    made = read_stored(file, stored, (slice(first * size, last * size), *rest))
    made = made.unflatten(0, (last - first, size // 2, 2)).transpose(1, 2).flatten(0, 2)
    return made[rows.start - first * size : rows.stop - first * size].contiguous()
