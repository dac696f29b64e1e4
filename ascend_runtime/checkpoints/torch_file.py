"""A file of torch.save: a zip of storages and of a pickle that says which tensors lie in them."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .parts import Part, Stored, read_stored
from .states import states

WRAPPERS = ("model", "state_dict")  # under which training systems keep the weights, beside what else they keep


class _Unread:
    """Stands for anything in a file that is no tensor, such as a training system's arguments: none of it is run."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


# What reading a broken zip or pickle ends in: whatever its bytes happen to ask for.
BROKEN = (RuntimeError, EOFError, ArithmeticError, AttributeError, AssertionError, LookupError, MemoryError, OSError,
          TypeError, ValueError)  # fmt: skip


def stored_tensors(file: BinaryIO | Path, path: Path) -> Any:
    """What torch.save wrote, a `Stored` in the place of each tensor. No weight is read.

    Only tensors and plain containers are made (weights_only); what else is in it becomes an `_Unread`.
    Raises ValueError, which names `path`, where it is broken, or asks for code of its own to be run.
    """
    try:
        return _read_pickle(file)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain containers, and code of a file is never run. Save its weights "
            "alone, as .safetensors."
        ) from None
    except BROKEN as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole file of torch.save ({why}). Download it again.") from None


def _read_pickle(file: BinaryIO | Path) -> Any:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if not isinstance(file, Path):
        file.seek(0)
    # Fake tensors have no memory, and their storages know where they lie (torch's notes on serialization).
    with torch.serialization.safe_globals([(_Unread, name) for name in unknown]), FakeTensorMode():
        # torch's own: torch_npu puts another in the place of torch.load, which moves tensors
        return _without_tensors(torch.serialization.load(file, weights_only=True, map_location="cpu"))


def _without_tensors(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_tensors(value) for key, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    start = content.untyped_storage()._checkpoint_offset + content.storage_offset() * content.itemsize
    stride = None if content.is_contiguous() else content.stride()
    return Stored(start, tuple(content.shape), content.dtype, stride)


class TorchFile:
    """See tensor_files.TensorFile. Names are those under "model" or "state_dict" where the file has such a part."""

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, str] = {}

    def __enter__(self) -> TorchFile:
        self._tensors = dict(_tensors(self.path, states((self.path,))))
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self._file = self.path.open("rb", buffering=0)
        self._mapping: mmap.mmap | None = None
        return self

    def __exit__(self, *_) -> None:
        self._file.close()  # the mapping lives as long as tensors in it do

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, part: Part | None = None, into: Tensor | None = None) -> Tensor:
        return read_stored(self._file, self._tensors[name], part, into)

    def in_rows(self, name: str) -> bool:
        return self._tensors[name].stride is None

    def mapped(self, name: str) -> Tensor:
        held = self._tensors[name]
        if held.stride is not None or 0 in held.shape:
            return self.read(name)
        if self._mapping is None:  # a private one: torch wants it writable, and nobody writes
            self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = torch.Size(held.shape).numel()
        return torch.frombuffer(self._mapping, dtype=held.dtype, count=count, offset=held.start).view(held.shape)


@lru_cache(maxsize=4)
def _tensors(path: Path, _: tuple) -> tuple[tuple[str, Stored], ...]:
    """By name. Raises ValueError where the file is cut, or holds what is no tensor in a way that cannot be passed."""
    content = stored_tensors(path, path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no tensors by name.")
    if "model0" in content:
        raise ValueError(
            f"{path} holds virtual pipeline stages (model0, model1 ...). Convert it with MindSpeed-MM's mm-convert "
            "WanConverter resplit, to one stage."
        )
    weights = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    return tuple(_named(weights))


def _named(content: Mapping, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    for key, value in content.items():
        if isinstance(value, Stored):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{key}.")
