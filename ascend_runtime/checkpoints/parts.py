"""Parts of the tensors of a .safetensors file, read straight into memory of their own.

A slice of a mapped file would do, but its pages count as the rank's memory until the file is closed, so that a group
of ranks would hold up to twice what it loads, and the kernel reads ahead of each into what other ranks hold.
"""

from __future__ import annotations

import json
import math
import os
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

# The names of the format (https://huggingface.co/docs/safetensors, "Format").
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Parts:
    """A context manager. The file must be known to be whole (see reader.open_shard)."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> Parts:
        self._file = self._path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        self._header, self._start = json.loads(self._file.read(length)), 8 + length
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def dtype(self, key: str) -> torch.dtype | None:
        """None: one that torch has not."""
        return DTYPES.get(self._header[key]["dtype"])

    def read(self, key: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """This part of a tensor, in its dtype on disk; None: all of it. No other byte is read.

        Raises ValueError for a dtype that torch has not, and where the file became shorter.
        """
        held = self._header[key]
        if self.dtype(key) is None:
            raise ValueError(f"{self._path} holds {key} as {held['dtype']}. Take its fp32, fp16 or bf16 form.")
        if part is None:
            part = tuple(slice(0, size) for size in held["shape"])
        tensor = torch.empty([own.stop - own.start for own in part], dtype=self.dtype(key))
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        begins, length = _runs(held["shape"], part)
        start, size = self._start + held["data_offsets"][0], length * tensor.itemsize
        for number, begin in enumerate(begins if size else ()):
            self._fill(memory[number * size : (number + 1) * size], start + begin * tensor.itemsize)
        return tensor

    def _fill(self, memory: memoryview, offset: int) -> None:
        while memory:
            count = os.preadv(self._file.fileno(), [memory], offset)
            if not count:
                raise ValueError(f"{self._path} became shorter while it was read. Load it again.")
            memory, offset = memory[count:], offset + count


def _runs(shape: list[int], part: tuple[slice, ...]) -> tuple[list[int], int]:
    """Where the pieces of a part that lie in one begin, and how long each is; in elements."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = max((dim for dim, size in enumerate(shape) if part[dim] != slice(0, size)), default=0)
    first = sum(own.start * stride for own, stride in zip(part[cut:], strides[cut:]))
    outer = product(*(range(own.start, own.stop) for own in part[:cut]))
    begins = [first + sum(index * stride for index, stride in zip(indices, strides)) for indices in outer]
    return begins, math.prod(own.stop - own.start for own in part[cut:])
