"""A diffusion transformer of videos: what the runtime asks of one, whichever family it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ...ops import PlainOperators
from ...parallel.sequence import Sequence
from .block_stack import EVERYTHING, Pass


class VideoTransformer(Protocol):
    """An nn.Module that predicts the velocity of a noisy latent, written for one device.

    config: as diffusers writes it, complete. blocks: in the order in which they compute, in one numbering whatever
    their kinds. units: what FSDP gathers at once, in the order in which they begin.
    """

    config: Mapping[str, Any]
    blocks: list[nn.Module]
    units: list[nn.Module]

    def arrange(self, operators: PlainOperators, sequence: Sequence | None = None) -> None:
        """Says which operators compute from now on, and how the tokens are spread over ranks (None: all are here)."""

    def forward(self, latent: Tensor, timestep: Tensor, context: Any, passing: Pass = EVERYTHING) -> Tensor:
        """The velocity [B,C_out,T,H,W] of a latent [B,C,T,H,W].

        timestep, context: as the family's conditioner makes them. passing: what of the blocks is computed.
        """

    def forget(self) -> None:
        """Frees what was kept between the steps of one generation."""
