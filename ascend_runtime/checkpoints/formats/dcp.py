"""A distributed checkpoint of torch (torch.distributed.checkpoint): a folder of .distcp files and `.metadata`.

Its own reader runs whatever `.metadata`, a pickle, asks for; here it can name tensors' places and nothing else. Each
tensor lies there in chunks, each chunk as a small file of torch.save within a .distcp file.
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

from ..bounded import LONGEST_NAME, MOST_DIMS, plain_file_name, read_bounded
from ..faults import shown
from ..states import states
from .parts import Part, Stored, read_stored, whole
from .pickles import LONGEST, Record, read_pickle
from .torch_file import dtype_of, sizes, stored_tensors

METADATA = ".metadata"
WRAPPER = "model."  # before the names of the weights, where others lie beside them
MOST_CHUNKS = 200_000  # of all tensors; 16 ranks that train a 14B model write 70,000


@dataclass(frozen=True)
class _Chunk:
    """Where a piece of a tensor lies: in the tensor, and as a file of torch.save within a file."""

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
    """See tensor_files.TensorFile. Names are those behind "model." where there are such."""

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, str] = {}

    def __enter__(self) -> DistributedCheckpoint:
        tensors = dict(_tensors(self.path, states((self.path,))))
        wrapped = {name.removeprefix(WRAPPER): held for name, held in tensors.items() if name.startswith(WRAPPER)}
        self._tensors = wrapped or tensors
        self.shapes = {name: held.shape for name, held in self._tensors.items()}
        self._stored: dict[_Chunk, Stored] = {}  # that were asked for
        return self

    def __exit__(self, *_) -> None:
        pass  # a file is open while a chunk of it is read

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, part: Part | None = None, into: Tensor | None = None) -> Tensor:
        held = self._tensors[name]
        part = whole(held.shape) if part is None else part
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

    def mapped(self, name: str, part: Part | None = None) -> Tensor:
        return self.read(name, part)

    def _read_chunk(self, chunk: _Chunk, part: Part) -> Tensor:
        with chunk.file.open("rb", buffering=0) as file:
            if chunk not in self._stored:  # by several threads perhaps, who find the same
                self._stored[chunk] = self._described(file, chunk)
            return read_stored(file, self._stored[chunk], part)

    def _described(self, file, chunk: _Chunk) -> Stored:
        found = stored_tensors(_View(file, chunk.start, chunk.length), chunk.file)
        if not isinstance(found, Stored) or found.shape != chunk.sizes:
            raise ValueError(f"{chunk.file} holds no tensor {list(chunk.sizes)} at byte {chunk.start}, where "
                             f"{self.path / METADATA} says that it does. Copy the whole folder again.")  # fmt: skip
        return replace(found, start=chunk.start + found.start)


def _moved(own: slice, by: int) -> slice:
    return slice(own.start + by, own.stop + by)


@lru_cache(maxsize=4)
def _tensors(path: Path, _: tuple) -> tuple[tuple[str, _Spread], ...]:
    """By name. Raises ValueError where `.metadata` says nothing of the sort, or a file that it names is cut."""
    content = read_bounded(path / METADATA, LONGEST)
    try:
        metadata = read_pickle(content, {"torch.Size": sizes})
        tensors = tuple(_described(path, _field(metadata, "state_dict_metadata"), _field(metadata, "storage_data")))
    except ValueError as error:
        raise ValueError(f"{path / METADATA} is not of a distributed checkpoint of torch ({shown(error)}).") from None
    lengths = {file: file.stat().st_size if file.is_file() else -1 for file in
               {chunk.file for _, held in tensors for chunk in held.chunks}}  # fmt: skip
    for chunk in (chunk for _, held in tensors for chunk in held.chunks):
        if lengths[chunk.file] < chunk.start + chunk.length:
            raise ValueError(f"{chunk.file} is missing or cut short. Copy the whole folder again.")
    return tensors


def _field(record: Any, name: str, *kinds: type) -> Any:
    """An attribute of a record. Raises ValueError where it has none of these kinds (none: dict)."""
    found = record.get(name) if isinstance(record, Record) else None
    if type(found) not in (kinds or (dict,)):
        raise ValueError(f"its {name} is {'missing' if found is None else 'something else'}")
    return found


def _described(path: Path, described: dict, stored: dict) -> Iterator[tuple[str, _Spread]]:
    """The tensors by name. described: what is said of each; stored: where each chunk lies, by what stands for it."""
    places = {(_field(index, "fqn", str), _sizes(index, "offset")): place for index, place in stored.items()
              if isinstance(index, Record) and index.get("offset") is not None}  # fmt: skip
    left = MOST_CHUNKS
    for name, held in described.items():
        if isinstance(held, Record) and held.get("chunks") is not None:
            left -= len(_field(held, "chunks", list))
            if left < 0 or type(name) is not str or len(name) > LONGEST_NAME:
                raise ValueError(f"it names more than {MOST_CHUNKS} chunks, or a tensor by what is no name")
            yield name, _spread(path, name, held, places)


def _sizes(record: Any, name: str) -> tuple[int, ...]:
    """Few whole numbers: they are hashed and reckoned with. Raises ValueError for anything else."""
    found = _field(record, name, tuple)
    if len(found) > MOST_DIMS or any(type(one) is not int or not 0 <= one < 2**63 for one in found):
        raise ValueError(f"its {name} is no shape")
    return found


def _spread(path: Path, name: str, held: Record, places: dict) -> _Spread:
    arguments = _field(held, "properties", Record)
    dtype = dtype_of(next(iter(arguments.state if isinstance(arguments.state, tuple) else arguments.arguments), None))
    if dtype is None:
        raise ValueError(f"{name} has no dtype of torch")
    chunks = tuple(_chunk(path, name, chunk, places) for chunk in _field(held, "chunks", list))
    shape = _sizes(held, "size")
    if any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks):
        raise ValueError(f"{name} has chunks of other dims than its own")
    return _Spread(shape, dtype, chunks)


def _chunk(path: Path, name: str, chunk: Any, places: dict) -> _Chunk:
    offsets = _sizes(chunk, "offsets")
    place = places.get((name, offsets))
    if place is None:
        raise ValueError(f"it says not where {name} lies")
    if place.get("transform_descriptors"):
        raise ValueError(f"it holds {name} compressed. Save it again without extensions")
    file = _field(place, "relative_path", str)
    if not plain_file_name(file):
        raise ValueError(f"it names the file {file!r}, which does not lie next to it")
    start, length = _field(place, "offset", int), _field(place, "length", int)
    if start < 0 or length < 0:
        raise ValueError(f"it says that {name} lies at byte {start}")
    return _Chunk(path / file, start, length, offsets, _sizes(chunk, "sizes"))


class _View(io.RawIOBase):
    """`length` bytes of an open file, from `start`, as a file of its own."""

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
