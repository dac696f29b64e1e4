"""An all-gather for FSDP2 over Gloo that receives each rank's shard directly into the output.

Gloo's own all-gather fills a separate buffer and copies it to the output, so that a rank holds one more block than
FSDP2 needs.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class DirectGather:
    """For FSDPModule.set_custom_all_gather. Each rank sends its shard R-1 times, as in any all-gather."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """output_tensor [R * n]; input_tensor [n], this rank's shard, is a view of it."""
        own, places = dist.get_rank(group), output_tensor.chunk(dist.get_world_size(group))
        assert places[own].data_ptr() == input_tensor.data_ptr(), "FSDP2 puts the shard into its place"
        exchanges = []
        for rank, place in enumerate(places):
            if rank != own:
                peer = dist.get_global_rank(group, rank)
                exchanges.append(dist.P2POp(dist.isend, input_tensor, peer, group))
                exchanges.append(dist.P2POp(dist.irecv, place, peer, group))
        work = _AllOf(dist.batch_isend_irecv(exchanges))
        if async_op:
            return work
        work.wait()
        return None


class _AllOf(dist.Work):
    """Several works as one."""

    def __init__(self, works: list[dist.Work]):
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """timeout: zero for the group's own. Waits for all works even if one fails, because they use the buffers."""
        with ExitStack() as waits:
            for work in self._works:
                waits.callback(work.wait, timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)
