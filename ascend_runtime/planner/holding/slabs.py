"""How the weights of experts that take turns lie in pinned host memory.

Pinned allocators round each request up to a power of two: torch's for CUDA, and torch_npu's (Ascend/pytorch,
torch_npu/csrc/core/npu/CachingHostAllocator.cpp, which is built on torch's). Two experts of Wan2.2-A14B would take 701
GB instead of 458 on 8 ranks. torch_npu 2.13 can turn this off (pinned_max_round_threshold_mb of
PYTORCH_NPU_ALLOC_CONF), earlier ones cannot. So tensors lie in slabs, whose sizes are powers of two: 468 GB.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

SLAB = 2**29  # bytes; of 2**28 to 2**32, this wastes the least for Wan2.2-A14B (2%)
ALIGNED = 64  # bytes; each tensor starts at a multiple


class Slabs(NamedTuple):
    """sizes: of the slabs, in bytes. places: (the slab, the first byte in it) of each tensor."""

    sizes: list[int]
    places: dict[Hashable, tuple[int, int]]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


def slabs_of(sizes: Mapping[Hashable, int]) -> Slabs:
    """Places each tensor, the largest first, in the first slab that has room for it. sizes: of tensors, in bytes."""
    used, places = [], {}
    for key in sorted(sizes, key=sizes.get, reverse=True):
        nbytes = -(-sizes[key] // ALIGNED) * ALIGNED
        slab = next((number for number, taken in enumerate(used) if taken + nbytes <= SLAB), len(used))
        used += [0] * (slab == len(used))
        places[key] = slab, used[slab]
        used[slab] += nbytes
    return Slabs([power_of_two(taken) for taken in used], places)


def power_of_two(nbytes: int) -> int:
    """The smallest power of two that is not below this number."""
    return 1 << max(0, nbytes - 1).bit_length()
