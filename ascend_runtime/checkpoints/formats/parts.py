"""A part of a tensor that lies in a file, read straight into memory of its own.

A slice of a mapped file would do, but its pages count as the rank's memory until the file is closed, so that a group
of ranks would hold up to twice what it loads, and the kernel reads ahead of each into what other ranks hold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import BinaryIO

import torch
from torch import Tensor

from ..fused import Rows

Part = tuple[slice, ...]  # of a tensor: one slice a dim, none with a step


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, `start` bytes from its beginning. stride, in elements; None: row by row, without gaps."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None


def read_stored(file: BinaryIO, stored: Stored, part: Part | None = None, into: Tensor | None = None) -> Tensor:
    """This part of a tensor, in its dtype on disk; None: all of it. No other byte is read, if it lies row by row.

    file: open without a buffer. into: where it goes, in one piece of memory, of its shape and dtype; None: memory of
    its own. Raises ValueError where it became shorter.
    """
    if stored.stride is not None:
        span = 1 + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride))
        flat = read_stored(file, Stored(stored.start, (span,), stored.dtype))
        tensor = flat.as_strided(stored.shape, stored.stride)
        tensor = tensor if part is None else tensor[part]
        return tensor.contiguous() if into is None else into.copy_(tensor)
    part = whole(stored.shape) if part is None else part
    tensor = torch.empty([own.stop - own.start for own in part], dtype=stored.dtype) if into is None else into
    memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    begins, length = _runs(stored.shape, part)
    size = length * tensor.itemsize
    for number, begin in enumerate(begins if size else ()):
        _fill(file, memory[number * size : (number + 1) * size], stored.start + begin * tensor.itemsize)
    return tensor


def whole(shape: Sequence[int]) -> Part:
    return tuple(slice(0, size) for size in shape)


def by_rows(part: Part, itemsize: int, nbytes: int) -> Iterator[Part]:
    """A part in pieces of about so many bytes, each some rows of it; one at least."""
    if not part:
        yield part
        return
    rows, *rest = part
    count = max(1, nbytes // max(1, itemsize * math.prod(own.stop - own.start for own in rest)))
    for start in range(rows.start, max(rows.stop, rows.start + 1), count):
        yield slice(start, min(start + count, rows.stop)), *rest


def in_ranges(part: Part, rows: Rows | None) -> list[tuple[Part, Part]]:
    """A part of the tensor that these rows of another make, in pieces that each lie in one range: (which part of it,
    where that lies in the other). One piece at least. rows: None, all, as they lie."""
    if rows is None:
        return [(part, part)]
    (wanted, *rest), pieces, before = part, [], 0
    for own in rows:
        start, stop = max(wanted.start, before), min(wanted.stop, before + own.stop - own.start)
        if start < stop:
            shift = own.start - before
            pieces.append(((slice(start, stop), *rest), (slice(start + shift, stop + shift), *rest)))
        before += own.stop - own.start
    return pieces or [(part, (slice(0, 0), *rest))]


def _fill(file: BinaryIO, memory: memoryview, offset: int) -> None:
    while memory:
        count = os.preadv(file.fileno(), [memory], offset)
        if not count:
            raise ValueError(f"{file.name} became shorter while it was read. Load it again.")
        memory, offset = memory[count:], offset + count


def _runs(shape: Sequence[int], part: Part) -> tuple[list[int], int]:
    """Where the pieces of a part that lie in one begin, and how long each is; in elements."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = max((dim for dim, size in enumerate(shape) if part[dim] != slice(0, size)), default=0)
    first = sum(own.start * stride for own, stride in zip(part[cut:], strides[cut:]))
    outer = product(*(range(own.start, own.stop) for own in part[:cut]))
    begins = [first + sum(index * stride for index, stride in zip(indices, strides)) for indices in outer]
    return begins, math.prod(own.stop - own.start for own in part[cut:])
