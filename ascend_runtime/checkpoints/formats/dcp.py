"""Reads torch distributed checkpoints (torch.distributed.checkpoint): a folder of .distcp files and `.metadata`.

torch's own reader runs any code that `.metadata`, a pickle, names; this one only reads from it where tensors lie. Each
tensor is stored in chunks, and each chunk as a small torch.save file within a .distcp file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import coded_error
from ..bounded import MAX_DIMS, MAX_NAME_LENGTH, plain_file_name, read_bounded
from ..faults import shown
from ..states import states
from .parts import Slices, Stored, full_slices, read_stored
from .pickles import MAX_PICKLE_BYTES, PickledObject, read_pickle
from .torch_file import dtype_of, sizes, stored_tensors

METADATA = ".metadata"
WRAPPER = "model."  # the prefix of the weights in a checkpoint that has other tensors too
MAX_CHUNKS = 200_000  # of all tensors; a 14B model trained on 16 ranks has 70,000


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a tensor: its offsets and sizes in the tensor, and its torch.save file, `length` bytes of
    `file`."""

    file: Path
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Spread:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class DistributedCheckpoint:
    """See tensor_file.TensorFile. If some names begin with "model.", only these tensors count, without the prefix."""

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, str] = {}

    def __enter__(self) -> DistributedCheckpoint:
        tensors = dict(_tensors(self.path, states((self.path,))))
        wrapped = {name.removeprefix(WRAPPER): held for name, held in tensors.items() if name.startswith(WRAPPER)}
        self._tensors = wrapped or tensors
        self.shapes = {name: held.shape for name, held in self._tensors.items()}
        self._stored: dict[_Chunk, Stored] = {}  # of the chunks that were read
        return self

    def __exit__(self, *_) -> None:
        pass  # a file is open only while a chunk of it is read

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, part: Slices | None = None, into: Tensor | None = None) -> Tensor:
        held = self._tensors[name]
        part = full_slices(held.shape) if part is None else part
        tensor = torch.empty([own.stop - own.start for own in part], dtype=held.dtype) if into is None else into
        for chunk in held.chunks:
            overlap = [
                slice(max(own.start, offset), min(own.stop, offset + size))
                for own, offset, size in zip(part, chunk.offsets, chunk.sizes)
            ]
            if all(own.start < own.stop for own in overlap):
                within = tuple(_moved(own, -offset) for own, offset in zip(overlap, chunk.offsets))
                to = tuple(_moved(own, -begin.start) for own, begin in zip(overlap, part))
                tensor[to] = self._read_chunk(chunk, within)
        return tensor

    def in_rows(self, name: str) -> bool:
        return True

    def mapped(self, name: str, part: Slices | None = None) -> Tensor:
        return self.read(name, part)

    def _read_chunk(self, chunk: _Chunk, part: Slices) -> Tensor:
        with chunk.file.open("rb", buffering=0) as file:
            if chunk not in self._stored:  # several threads may compute the same value
                self._stored[chunk] = self._described(file, chunk)
            return read_stored(file, self._stored[chunk], part)

    def _described(self, file, chunk: _Chunk) -> Stored:
        found = stored_tensors(_View(file, chunk.start, chunk.length), chunk.file)
        if not isinstance(found, Stored) or found.shape != chunk.sizes:
            raise coded_error(
                "AV-1302",
                f"{chunk.file} holds no tensor {list(chunk.sizes)} at byte {chunk.start}, but {self.path / METADATA} "
                "says so. Copy the whole folder again.",
            )
        return replace(found, start=chunk.start + found.start)


def _moved(own: slice, by: int) -> slice:
    return slice(own.start + by, own.stop + by)


@lru_cache(maxsize=4)
def _tensors(path: Path, _: tuple) -> tuple[tuple[str, _Spread], ...]:
    """The tensors by name. Raises ValueError if `.metadata` is invalid, or a file that it names is missing or cut."""
    content = read_bounded(path / METADATA, MAX_PICKLE_BYTES)
    try:
        metadata = read_pickle(content, {"torch.Size": sizes})
        tensors = tuple(_described(path, _field(metadata, "state_dict_metadata"), _field(metadata, "storage_data")))
    except ValueError as error:
        raise coded_error(
            "AV-1309", f"{path / METADATA} is not the metadata of a torch distributed checkpoint ({shown(error)})."
        ) from None
    lengths = {file: file.stat().st_size if file.is_file() else -1 for file in
               {chunk.file for _, held in tensors for chunk in held.chunks}}  # fmt: skip
    for chunk in (chunk for _, held in tensors for chunk in held.chunks):
        if lengths[chunk.file] < chunk.start + chunk.length:
            raise coded_error("AV-1302", f"{chunk.file} is missing or cut short. Copy the whole folder again.")
    return tensors


def _field(record: Any, name: str, *kinds: type) -> Any:
    """An attribute of a record, of one of these types (default: dict). Raises ValueError for another type."""
    found = record.get(name) if isinstance(record, PickledObject) else None
    if type(found) not in (kinds or (dict,)):
        raise ValueError(f"its {name} {'is missing' if found is None else 'has the wrong type'}")
    return found


def _described(path: Path, described: dict, stored: dict) -> Iterator[tuple[str, _Spread]]:
    """The tensors by name. described: the metadata of each; stored: where each chunk lies, by its index."""
    places = {(_field(index, "fqn", str), _sizes(index, "offset")): place for index, place in stored.items()
              if isinstance(index, PickledObject) and index.get("offset") is not None}  # fmt: skip
    left = MAX_CHUNKS
    for name, held in described.items():
        if isinstance(held, PickledObject) and held.get("chunks") is not None:
            left -= len(_field(held, "chunks", list))
            if left < 0 or type(name) is not str or len(name) > MAX_NAME_LENGTH:
                raise ValueError(f"it has more than {MAX_CHUNKS} chunks, or an invalid tensor name")
            yield name, _spread(path, name, held, places)


def _sizes(record: Any, name: str) -> tuple[int, ...]:
    """A shape or offsets: at most MAX_DIMS integers. Raises ValueError for anything else."""
    found = _field(record, name, tuple)
    if len(found) > MAX_DIMS or any(type(one) is not int or not 0 <= one < 2**63 for one in found):
        raise ValueError(f"its {name} is not a shape")
    return found


def _spread(path: Path, name: str, held: PickledObject, places: dict) -> _Spread:
    arguments = _field(held, "properties", PickledObject)
    dtype = dtype_of(next(iter(arguments.state if isinstance(arguments.state, tuple) else arguments.arguments), None))
    if dtype is None:
        raise ValueError(f"{name} has no torch dtype")
    chunks = tuple(_chunk(path, name, chunk, places) for chunk in _field(held, "chunks", list))
    shape = _sizes(held, "size")
    if any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks):
        raise ValueError(f"{name} has chunks with a different number of dims")
    return _Spread(shape, dtype, chunks)


def _chunk(path: Path, name: str, chunk: Any, places: dict) -> _Chunk:
    offsets = _sizes(chunk, "offsets")
    place = places.get((name, offsets))
    if place is None:
        raise ValueError(f"it does not say where {name} lies")
    if place.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed. Save the checkpoint again without extensions")
    file = _field(place, "relative_path", str)
    if not plain_file_name(file):
        raise ValueError(f"it names {file!r}, which is not the name of a file next to it")
    start, length = _field(place, "offset", int), _field(place, "length", int)
    if start < 0 or length < 0:
        raise ValueError(f"it says that {name} lies at byte {start}, with {length} bytes")
    return _Chunk(path / file, start, length, offsets, _sizes(chunk, "sizes"))


class _View(io.RawIOBase):
    """A file-like view of `length` bytes of an open file, from `start` on."""

    def __init__(self, file, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(self._length - self._at, 0))
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += count
        return count
