"""Parts of tensors: whether they can be, and where they lie in the memory of the whole. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from .control import Wrote
from .envelopes import Region

SHORTEST_STRETCH = 1 << 14  # bytes; shorter pieces are gathered, as each one costs a system call and a TLS record


def is_inside(part: Region | Wrote) -> bool:
    """Whether a part is within its tensor, and not empty."""
    same_dims = len(part.starts) == len(part.sizes) == len(part.shape)
    sides = zip(part.starts, part.sizes, part.shape)
    inside = all(start >= 0 and size > 0 and start + size <= whole for start, size, whole in sides)
    return same_dims and inside and part.itemsize > 0


def stretches_of(region: Region) -> Iterator[tuple[int, int]]:
    """The bytes from ... to ... of each piece of a part that lies in memory without a gap, in order; all are equally
    long. The part must be inside (`is_inside`)."""
    strides = [region.itemsize * math.prod(region.shape[dim + 1 :]) for dim in range(len(region.shape))]
    inner = len(region.shape)  # the first dim of those that are one piece together
    while inner and (inner == len(region.shape) or region.sizes[inner] == region.shape[inner]):
        inner -= 1
    first = sum(start * stride for start, stride in zip(region.starts, strides))
    length = region.sizes[inner] * strides[inner] if strides else region.itemsize
    for steps in product(*map(range, region.sizes[:inner])):
        start = first + sum(step * stride for step, stride in zip(steps, strides))
        yield start, start + length
