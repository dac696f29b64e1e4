"""Where a rank keeps a component."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..parallel.fsdp import Sharding


@dataclass(frozen=True)
class Room:
    """device: of this rank. sharding: how ranks share the weights of a diffusion model or a text encoder.

    host_memory: the bytes that all ranks of this host together may use. Ranks that load at the same time must agree on
    it beforehand, since each would see what the others have already taken.
    """

    device: torch.device
    sharding: Sharding
    host_memory: int
