"""A distributed checkpoint of torch (torch.distributed.checkpoint): a folder of .distcp files and `.metadata`.

Its own reader runs whatever `.metadata`, a pickle, asks for; here it can name tensors' places and nothing else. Each
tensor lies there in chunks, each chunk as a small file of torch.save within a .distcp file.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .parts import Part, Stored, read_stored, whole
from .states import states
from .torch_file import BROKEN, stored_tensors

METADATA = ".metadata"
WRAPPER = "model."  # before the names of the weights, where others lie beside them


class _Record:
    """Stands for any object of the pickle: keeps the attributes that it is given, and runs nothing."""

    def __init__(self, *arguments, **_):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.arguments = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # of a dict of a kind of its own, which names no tensor


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype) or dtype is torch.Size:
            return dtype
        return _Record


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
        self._one_at_a_time = Lock()
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

    def mapped(self, name: str) -> Tensor:
        return self.read(name)

    def _read_chunk(self, chunk: _Chunk, part: Part) -> Tensor:
        with chunk.file.open("rb", buffering=0) as file:
            with self._one_at_a_time:  # what a pickle may name is the whole process's
                if chunk not in self._stored:
                    found = stored_tensors(_View(file, chunk.start, chunk.length), chunk.file)
                    self._stored[chunk] = replace(found, start=chunk.start + found.start)
            return read_stored(file, self._stored[chunk], part)


def _moved(own: slice, by: int) -> slice:
    return slice(own.start + by, own.stop + by)


@lru_cache(maxsize=4)
def _tensors(path: Path, _: tuple) -> tuple[tuple[str, _Spread], ...]:
    """By name. Raises ValueError where `.metadata` says nothing of the sort, or a file that it names is cut."""
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _Metadata(file).load()
        places = {(index.fqn, tuple(index.offset)): place for index, place in metadata.storage_data.items()
                  if getattr(index, "offset", None) is not None}  # fmt: skip
        described = [(name, held) for name, held in metadata.state_dict_metadata.items() if hasattr(held, "chunks")]
        tensors = tuple((name, _spread(path, name, held, places)) for name, held in described)
    except (pickle.UnpicklingError, *BROKEN) as error:
        raise ValueError(f"{path / METADATA} is not of a distributed checkpoint of torch ({error}).") from None
    for chunk in (chunk for _, held in tensors for chunk in held.chunks):
        if not chunk.file.is_file() or chunk.file.stat().st_size < chunk.start + chunk.length:
            raise ValueError(f"{chunk.file} is missing or cut short. Copy the whole folder again.")
    return tensors


def _spread(path: Path, name: str, held: _Record, places: dict) -> _Spread:
    chunks = []
    for chunk in held.chunks:
        place = places[name, tuple(chunk.offsets)]
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{path} holds {name} compressed. Save it again without extensions.")
        file = path / Path(place.relative_path).name
        chunks.append(_Chunk(file, place.offset, place.length, tuple(chunk.offsets), tuple(chunk.sizes)))
    return _Spread(tuple(held.size), held.properties.arguments[0], tuple(chunks))


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
