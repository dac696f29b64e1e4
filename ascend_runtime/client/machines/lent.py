"""Parts of results that a machine sends, received where they belong in the memory that the client lends."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from ...wire.envelopes import Region
from ...wire.messages import SharedTensor, Undecodable
from ...wire.regions import SHORTEST_STRETCH, is_inside, stretches_of


class LentForResult:
    """Memory that the client lends for a result, as one machine writes it. shared: owned by the caller."""

    def __init__(self, shared: SharedTensor):
        self._memory = memoryview(mmap.mmap(shared.fd, shared.nbytes)) if shared.nbytes else memoryview(bytearray())
        self._shape, self._dtype = tuple(shared.shape), shared.dtype
        self._aside: tuple[Region, bytearray] | None = None  # a part of many short pieces, on its way

    def place(self, region: Region) -> list[memoryview]:
        """Where a part's content belongs. Raises Undecodable if it is no part of this result."""
        self._check(region)
        pieces = stretches_of(region)
        first, last = next(pieces)
        if last - first >= SHORTEST_STRETCH:
            return [self._memory[start:stop] for start, stop in ((first, last), *pieces)]
        self._aside = region, bytearray(region.itemsize * math.prod(region.sizes))
        return [memoryview(self._aside[1])]

    def settle(self) -> None:
        """Copies a part that has arrived elsewhere to where it belongs."""
        if self._aside is None:
            return
        (region, content), self._aside = self._aside, None
        place = tuple(slice(start, start + size) for start, size in zip(region.starts, region.sizes))
        part = torch.frombuffer(content, dtype=self._dtype).view(region.sizes)
        self._tensor[place].copy_(part)

    @property
    def _tensor(self) -> Tensor:
        return torch.frombuffer(self._memory, dtype=self._dtype).view(self._shape)

    def _check(self, region: Region) -> None:
        if region.shape != self._shape or region.itemsize != self._dtype.itemsize or not is_inside(region):
            raise Undecodable(
                f"A part at {region.starts[:8]} of {region.sizes[:8]}, with {region.itemsize} bytes an element, is not "
                f"in a result {list(self._shape)} of {self._dtype}."
            )
