"""How FSDP2 gathers weights over Gloo: each rank's share straight to its place.

Gloo's own all-gather fills a buffer of its own and copies it to the output, so that a rank holds one more block than
FSDP2 asks for.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Ranks along an axis that spans them all share one group, a ring's and this: a tag of its own keeps messages apart,
# whichever is waited for first.
TAG = 1


class DirectGather:
    """For FSDPModule.set_custom_all_gather; sends what an all-gather does, a rank its share R-1 times."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """output_tensor [R * n], of which input_tensor [n], this rank's share, is a part."""
        own, places = dist.get_rank(group), output_tensor.chunk(dist.get_world_size(group))
        assert places[own].data_ptr() == input_tensor.data_ptr(), "FSDP2 puts the share into its place"
        exchanges = []
        for rank, place in enumerate(places):
            if rank != own:
                peer = dist.get_global_rank(group, rank)
                exchanges.append(dist.P2POp(dist.isend, input_tensor, peer, group, TAG))
                exchanges.append(dist.P2POp(dist.irecv, place, peer, group, TAG))
        work = _Together(dist.batch_isend_irecv(exchanges))
        if async_op:
            return work
        work.wait()
        return None


class _Together(dist.Work):
    """Several works as one."""

    def __init__(self, works: list[dist.Work]):
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """timeout: zero is the group's own. All are waited for, whichever fails: their memory must outlive them."""
        with ExitStack() as waits:
            for work in self._works:
                waits.callback(work.wait, timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)
