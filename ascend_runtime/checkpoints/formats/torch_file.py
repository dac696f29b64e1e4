"""Reads torch.save files: a zip archive of storages and a pickle that describes the tensors in them."""

from __future__ import annotations

import math
import mmap
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import coded_error
from ..bounded import MAX_DIMS, MAX_NAME_LENGTH, check_count
from ..faults import shown
from ..states import states
from .parts import Slices, Stored, read_stored
from .pickles import MAX_PICKLE_BYTES, Name, OtherPickle, PickledObject, read_pickle

# Keys under which training systems (the last one: DeepSpeed) keep the weights, next to other entries.
WRAPPERS = ("model", "state_dict", "module")
STORAGES = {  # the dtype of each of torch's storage classes; a tensor in an UntypedStorage has its own
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
MAX_DIRECTORY_BYTES = 8 * 2**20  # of a zip's central directory; that of 1,095 tensors has 0.2 MB
MAX_EXPANDED_BYTES = 2**26  # of a tensor that is larger than its storage, by strides of 0
MAX_DEPTH = 16  # of nested dicts
MAX_ENTRIES = 500_000  # of all nested dicts, each counted as often as it is reached


class _Storage:
    """A storage in a file: `nbytes` bytes from `start` on."""

    def __init__(self, start: int, nbytes: int, dtype: torch.dtype):
        self.start, self.nbytes, self.dtype = start, nbytes, dtype


# The errors that a broken zip or pickle may cause.
BROKEN = (RuntimeError, EOFError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError, TypeError,
          ValueError, zipfile.BadZipFile, struct.error)  # fmt: skip


def stored_tensors(file: BinaryIO, path: Path) -> Any:
    """The object that torch.save wrote, with a `Stored` for each tensor. Reads no weights.

    file: opened without a buffer, or a file-like view. Creates only tensors and plain containers, and runs no code of
    the file: other objects become a `PickledObject`. Raises ValueError, which names `path`, if the file is broken.
    """
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            return _read(file, archive)
    except OtherPickle as error:
        raise coded_error("AV-1305", f"{path} cannot be read: {error}") from None
    except BROKEN as error:
        why = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise coded_error("AV-1302", f"{path} is not a complete torch.save file ({why}). Download it again.") from None


class _Bounded:
    """A file from which zipfile cannot read more at once than a central directory may have."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        content = _taken(self._file, MAX_DIRECTORY_BYTES + 1 if count < 0 else min(count, MAX_DIRECTORY_BYTES + 1))
        if len(content) > MAX_DIRECTORY_BYTES:
            raise coded_error("AV-1312", f"its central directory has more than {MAX_DIRECTORY_BYTES} bytes")
        return content


def _taken(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or all that are left: one read of an unbuffered file may return fewer."""
    chunks = []
    while count and (chunk := file.read(count)):
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def _read(file: BinaryIO, archive: zipfile.ZipFile) -> Any:
    pickled = next((name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("it has no data.pkl")
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.NameToInfo and _content(file, archive, f"{folder}byteorder") != _byte_order():
        raise ValueError("it was written on a machine with a different byte order")

    def persistent(what: Any) -> _Storage | PickledObject:
        """The storage of an id ("storage", class, name, device, number of elements)."""
        _, of, key, *_ = what
        dtype = STORAGES.get(of.path.rpartition(".")[2]) if isinstance(of, Name) else None
        if dtype is None or type(key) is not str:
            return PickledObject(of, what)
        return _Storage(*_place(file, archive, f"{folder}data/{key}"), dtype)

    return read_pickle(_content(file, archive, pickled), MAKERS, persistent)


def _byte_order() -> bytes:
    return sys.byteorder.encode()


def _content(file: BinaryIO, archive: zipfile.ZipFile, name: str) -> bytes:
    start, nbytes = _place(file, archive, name)
    if nbytes > MAX_PICKLE_BYTES:
        raise coded_error(
            "AV-1312", f"its {name.rpartition('/')[2]} has {nbytes} bytes; at most {MAX_PICKLE_BYTES} are allowed"
        )
    file.seek(start)
    return _taken(file, nbytes)


def _place(file: BinaryIO, archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """(the start of a member's content, its number of bytes)"""
    member = archive.NameToInfo.get(name)
    if member is None:
        raise ValueError(f"it has no {shown(name)}")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"its {shown(name)} is compressed, which torch.save does not do")
    file.seek(member.header_offset)
    header = _taken(file, zipfile.sizeFileHeader)
    signature, *_, name_length, extra_length = struct.unpack(zipfile.structFileHeader, header)
    start = member.header_offset + len(header) + name_length + extra_length
    if signature != zipfile.stringFileHeader or start + member.file_size > file.seek(0, 2):
        raise ValueError(f"its {shown(name)} is not where the central directory says")
    return start, member.file_size


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored | PickledObject:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)"""
    if not isinstance(storage, _Storage):
        return PickledObject(Name("torch.Tensor"), (storage, offset, shape, stride))
    return _stored(storage, storage.dtype, offset, shape, stride)


def _tensor_of_bytes(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any):
    """torch._utils._rebuild_tensor_v3, for dtypes without a storage class"""
    named = dtype_of(dtype)
    if not isinstance(storage, _Storage) or named is None:
        return PickledObject(Name("torch.Tensor"), (storage, offset, shape, stride, dtype))
    return _stored(storage, named, offset, shape, stride)


def _stored(storage: _Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> Stored:
    numbers = (offset, *shape, *stride) if type(shape) is type(stride) is tuple and len(shape) <= MAX_DIMS else ()
    if len(numbers) != 1 + 2 * len(shape) or not all(type(one) is int and 0 <= one < 2**63 for one in numbers):
        raise ValueError(f"a tensor has an invalid shape {shown(shape)} or strides {shown(stride)}")
    count = math.prod(shape)
    needed = (offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride))) * dtype.itemsize if count else 0
    if needed > storage.nbytes:
        raise ValueError(f"a tensor {list(shape)} of {dtype} exceeds its storage of {storage.nbytes} bytes")
    if count * dtype.itemsize > max(storage.nbytes, MAX_EXPANDED_BYTES):
        raise coded_error("AV-1312", f"a tensor {list(shape)} of {dtype} repeats a storage of {storage.nbytes} bytes")
    in_rows = _row_by_row(shape, stride)
    return Stored(storage.start + offset * dtype.itemsize, shape, dtype, None if in_rows else stride)


def _row_by_row(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor is contiguous."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride)):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def dtype_of(named: Any) -> torch.dtype | None:
    """The dtype that a pickle names; None for anything else."""
    path = named.path if isinstance(named, Name) else ""
    found = getattr(torch, path.removeprefix("torch."), None) if path.startswith("torch.") else None
    return found if isinstance(found, torch.dtype) else None


def sizes(*arguments: Any) -> tuple[int, ...]:
    """torch.Size(sizes); `_stored` checks its values."""
    (found,) = arguments or ((),)
    if type(found) is not tuple or len(found) > MAX_DIMS:
        raise ValueError("a tensor has an invalid shape")
    return found


MAKERS = {
    "torch.Size": sizes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    # (function, class, arguments, state): a tensor of an unknown class may mean anything.
    "torch._tensor._rebuild_from_type_v2": lambda how, of, given, *_: (
        _tensor(*given) if how == REBUILD and of in PLAIN_TENSORS else PickledObject(of, given)
    ),
}
REBUILD = Name("torch._utils._rebuild_tensor_v2")
PLAIN_TENSORS = (Name("torch.Tensor"), Name("torch.nn.parameter.Parameter"))


class TorchFile:
    """See tensor_file.TensorFile. If the file has a dict of a name in WRAPPERS, its entries are the tensors."""

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
        self._file.close()  # tensors keep the mapping alive

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, part: Slices | None = None, into: Tensor | None = None) -> Tensor:
        return read_stored(self._file, self._tensors[name], part, into)

    def in_rows(self, name: str) -> bool:
        return self._tensors[name].stride is None

    def mapped(self, name: str, part: Slices | None = None) -> Tensor:
        held = self._tensors[name]
        if held.stride is not None or 0 in held.shape:
            return self.read(name, part)
        if self._mapping is None:  # private, because torch requires it to be writable; nothing writes to it
            self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = torch.Size(held.shape).numel()
        flat = torch.frombuffer(self._mapping, dtype=held.dtype, count=count, offset=held.start)
        return flat.view(held.shape) if part is None else flat.view(held.shape)[part]


@lru_cache(maxsize=4)
def _tensors(path: Path, _: tuple) -> tuple[tuple[str, Stored], ...]:
    """The tensors by name. Raises ValueError if the file is cut off, or does not hold a dict of tensors."""
    with path.open("rb", buffering=0) as file:
        content = stored_tensors(file, path)
    if not isinstance(content, Mapping):
        raise coded_error(
            "AV-1306",
            f"{path} holds {_what(content)} instead of a dict of tensors. Save the network's state_dict: "
            "torch.save(network.state_dict(), path).",
        )
    if "model0" in content:
        raise coded_error(
            "AV-1305",
            f"{path} holds virtual pipeline stages (model0, model1 ...). Convert it to one stage with MindSpeed-MM's "
            "mm-convert WanConverter resplit.",
        )
    weights = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    found = tuple(_named(path, weights))
    check_count(path, found)
    return found


def _what(content: Any) -> str:
    if isinstance(content, Stored):
        return "one tensor without a name"
    if isinstance(content, PickledObject):
        return f"an object of {shown(content.of.path)}" if isinstance(content.of, Name) else "an object"
    return f"a {type(content).__name__}"


def _named(path: Path, content: Mapping) -> Iterator[tuple[str, Stored]]:
    """The tensors in nested dicts, with joined names. A dict may occur many times, or contain itself, so entries are
    counted."""
    inner, met = [("", content, 1)], 0
    while inner:
        prefix, content, depth = inner.pop()
        met += len(content)
        if depth > MAX_DEPTH or met > MAX_ENTRIES or len(prefix) > MAX_NAME_LENGTH:
            raise coded_error("AV-1312", f"{path} holds too many nested dicts. Save its weights as one dict.")
        for key, value in content.items():
            if isinstance(value, Stored) and isinstance(key, (str, int)):
                yield f"{prefix}{key}", value
            elif isinstance(value, Mapping) and isinstance(key, (str, int)):
                inner.append((f"{prefix}{key}.", value, depth + 1))
