"""Model calls for samplers outside of the ranks: what they are given, and which of it the ranks hold already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NetworkPass:
    """One pass through the network.

    branch: of guidance, "cond" or "uncond". latent [B,C,T,H,W]: normalised, without further channels.
    timesteps [B], or [B, T] with one for each latent frame: in 0..1000.
    inputs: what stays the same from call to call, by name (see `models.shared.conditioning.Inputs`).
    skipped: the blocks that are left out, in one numbering whatever their kinds.
    """

    branch: str
    latent: Tensor
    timesteps: Tensor
    inputs: Mapping[str, Tensor]
    skipped: tuple[int, ...] = ()
