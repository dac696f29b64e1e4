"""The parts of lent memory that ranks have written, as the client gets them."""

from __future__ import annotations

import math

from ....wire.control import Wrote
from ....wire.envelopes import Region
from ....wire.regions import SHORTEST_STRETCH, is_inside, stretches_of


def region_of(wrote: Wrote) -> Region:
    """What the client gets to know. Raises ValueError if the part is not within its tensor."""
    if not is_inside(wrote):
        raise ValueError(f"A part at {wrote.starts} of {wrote.sizes} is not in a tensor of {wrote.shape}.")
    return Region(job=wrote.job, lent=wrote.lent, shape=wrote.shape, starts=wrote.starts, sizes=wrote.sizes,
                  itemsize=wrote.itemsize)  # fmt: skip


def content_of(region: Region, memory: memoryview) -> list[memoryview]:
    """A part's content, in order: views of the memory if its pieces are long, else a copy of it without gaps.

    memory: of the whole tensor. Raises ValueError if it is smaller than that.
    """
    if region.itemsize * math.prod(region.shape) > len(memory):
        raise ValueError(f"A tensor of {region.shape} is larger than the memory of {len(memory)} bytes.")
    pieces = [memory[start:stop] for start, stop in stretches_of(region)]
    if len(pieces) == 1 or len(pieces[0]) >= SHORTEST_STRETCH:
        return pieces
    return [memoryview(b"".join(pieces))]
