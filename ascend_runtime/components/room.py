"""Where a rank keeps a component."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..hardware import devices, memory
from ..parallel.fsdp import Sharding

ROOM_TO_COMPUTE = 8 * 2**30  # bytes for a job of which nothing is predicted: a 14B block at 1280 x 720 x 81 on one card


@dataclass
class HostMemory:
    """The bytes of host memory that all ranks of a host together may use. Ranks that load at the same time must agree
    on them beforehand, since each would see what the others have already taken; then each keeps count.

    free: available now. in_use, waiting: held by the diffusion model in use, and by the one that waits; available when
    they are dropped. pinned: kept by torch for later models. ranks: on a host. With several hosts, of each number the
    one that leaves the least room, so that all ranks decide alike.
    """

    free: int
    in_use: int = 0
    waiting: int = 0
    pinned: int = 0
    ranks: int = field(default_factory=devices.local_ranks)

    def has(self, nbytes: int, released: int = 0) -> bool:
        """Whether each rank can take so many bytes. released: what all of them together give back meanwhile."""
        return self.ranks * nbytes <= max(0, self.free + released - memory.ROOM)


@dataclass(frozen=True)
class Room:
    """device: of this rank. sharding: how ranks share the weights of a diffusion model or a text encoder. give_way:
    drops the diffusion model that waits, and counts what that frees. computing: the bytes of the device that a job
    takes besides a diffusion model's weights."""

    device: torch.device
    sharding: Sharding
    host_memory: HostMemory
    give_way: Callable[[HostMemory], None] = lambda host: None
    computing: int = ROOM_TO_COMPUTE

    def free_host(self, nbytes: int, pinned: bool = False) -> int:
        """The bytes of the host's memory for all ranks, of which each needs so many. Where they are short, the model
        that waits is dropped. pinned: whether they are to be pinned."""
        host = self.host_memory
        kept = host.pinned if pinned else 0
        if host.waiting and not host.has(nbytes, kept):
            self.give_way(host)
        return host.free + kept
