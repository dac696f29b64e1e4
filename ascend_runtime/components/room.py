"""Where a rank keeps a component."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..parallel.fsdp import Sharding


@dataclass(frozen=True)
class HostMemory:
    """The bytes of host memory that all ranks of this host together may use. Ranks that load at the same time must
    agree on them beforehand, since each would see what the others have already taken.

    free: available now. pinned: held by experts that take turns, and available to others in their place.
    """

    free: int
    pinned: int = 0

    @property
    def for_others(self) -> int:
        """For another diffusion model instead of the loaded one."""
        return self.free + self.pinned


@dataclass(frozen=True)
class Room:
    """device: of this rank. sharding: how ranks share the weights of a diffusion model or a text encoder."""

    device: torch.device
    sharding: Sharding
    host_memory: HostMemory
