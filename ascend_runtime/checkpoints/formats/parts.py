"""Reads slices of a tensor in a file directly into their own memory.

Slices of a mapped file would work too, but mapped pages count as the rank's memory until the file is closed, so ranks
would use up to twice the memory of what they load, and the kernel's readahead would load what other ranks hold.
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

from ...errors import coded_error
from ..fused import Rows, Target

Slices = tuple[slice, ...]  # a part of a tensor: one slice for each dim, none with a step


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, from byte `start` on. stride: in elements; None: contiguous."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None


def read_stored(file: BinaryIO, stored: Stored, part: Slices | None = None, into: Tensor | None = None) -> Tensor:
    """A part of a tensor, in its dtype on disk; None: all of it. Reads no other bytes if the tensor is contiguous.

    file: opened without a buffer. into: a contiguous tensor of the part's shape and dtype to read into; None: allocates
    one. Raises ValueError if the file became shorter.
    """
    if stored.stride is not None:
        span = 1 + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride))
        flat = read_stored(file, Stored(stored.start, (span,), stored.dtype))
        tensor = flat.as_strided(stored.shape, stored.stride)
        tensor = tensor if part is None else tensor[part]
        return tensor.contiguous() if into is None else into.copy_(tensor)
    part = full_slices(stored.shape) if part is None else part
    tensor = torch.empty([own.stop - own.start for own in part], dtype=stored.dtype) if into is None else into
    memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    begins, length = _runs(stored.shape, part)
    size = length * tensor.itemsize
    for number, begin in enumerate(begins if size else ()):
        _fill(file, memory[number * size : (number + 1) * size], stored.start + begin * tensor.itemsize)
    return tensor


def full_slices(shape: Sequence[int]) -> Slices:
    return tuple(slice(0, size) for size in shape)


def by_rows(part: Slices, itemsize: float, nbytes: int) -> Iterator[Slices]:
    """Splits a part by rows into pieces of about `nbytes` bytes; at least one piece."""
    if not part:
        yield part
        return
    rows, *rest = part
    count = max(1, int(nbytes // max(1, itemsize * math.prod(own.stop - own.start for own in rest))))
    for start in range(rows.start, max(rows.stop, rows.start + 1), count):
        yield slice(start, min(start + count, rows.stop)), *rest


def in_ranges(part: Slices, rows: Rows | None, columns: slice | None = None) -> list[tuple[Slices, Slices]]:
    """Splits a part of the tensor that these rows and columns of a larger tensor make, so that each piece lies in one
    range of rows: (the piece, its slices of the larger tensor). At least one piece. rows, columns: None for all, in
    order."""
    if rows is None:
        return [(part, in_columns(part, columns))]
    (wanted, *rest), pieces, before = part, [], 0
    for own in rows:
        start, stop = max(wanted.start, before), min(wanted.stop, before + own.stop - own.start)
        if start < stop:
            shift = own.start - before
            pieces.append(((slice(start, stop), *rest), (slice(start + shift, stop + shift), *rest)))
        before += own.stop - own.start
    pieces = pieces or [(part, (slice(0, 0), *rest))]
    return [(piece, in_columns(lies, columns)) for piece, lies in pieces]


def pieces_of(target: Target, shape: Sequence[int], lies: Slices) -> list[tuple[Slices, Slices]]:
    """The pieces of a parameter of this shape in a part of the larger tensor that holds it: (slices of the part, slices
    of the parameter)."""
    ranges = (slice(0, shape[0]),) if target.rows is None else target.rows
    columns = slice(0, shape[1]) if target.columns is None else target.columns
    pieces, before = [], 0
    for own in ranges:
        (at_rows, rows), (at_columns, its_columns) = _common(own, lies[0], before), _common(columns, lies[1], 0)
        if rows.start < rows.stop and its_columns.start < its_columns.stop:
            pieces.append(((at_rows, at_columns), (rows, its_columns)))
        before += own.stop - own.start
    return pieces


def _common(own: slice, wanted: slice, before: int) -> tuple[slice, slice]:
    """What two ranges have in common: (from the start of `wanted`, from that of `own`, which has `before` others)."""
    start, stop = max(own.start, wanted.start), min(own.stop, wanted.stop)
    at = slice(start - wanted.start, stop - wanted.start)
    return at, slice(start - own.start + before, stop - own.start + before)


def with_ones(part: Slices, dims: int) -> Slices:
    """The slices of a tensor of so many dims, of which those that `part` lacks are the last and have the size 1."""
    return (*part, *(slice(0, 1) for _ in range(dims - len(part))))


def in_columns(part: Slices, columns: slice | None) -> Slices:
    """The slices of a larger tensor, given those of its columns (dim 1). columns: None for all."""
    if columns is None:
        return part
    rows, own, *rest = part
    return rows, slice(own.start + columns.start, own.stop + columns.start), *rest


def _fill(file: BinaryIO, memory: memoryview, offset: int) -> None:
    while memory:
        count = os.preadv(file.fileno(), [memory], offset)
        if not count:
            raise coded_error("AV-1315", f"{file.name} became shorter while it was read. Load it again.")
        memory, offset = memory[count:], offset + count


def _runs(shape: Sequence[int], part: Slices) -> tuple[list[int], int]:
    """(the starts of a part's contiguous runs, the length of each run), in elements."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = max((dim for dim, size in enumerate(shape) if part[dim] != slice(0, size)), default=0)
    first = sum(own.start * stride for own, stride in zip(part[cut:], strides[cut:]))
    outer = product(*(range(own.start, own.stop) for own in part[:cut]))
    begins = [first + sum(index * stride for index, stride in zip(indices, strides)) for indices in outer]
    return begins, math.prod(own.stop - own.start for own in part[cut:])
