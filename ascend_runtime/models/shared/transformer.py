"""The interface of a video diffusion transformer of any family."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ...ops import PlainOperators
from ...ops.plain import RotaryTable
from ...parallel.sequence import SequenceLayout
from .block_stack import EVERYTHING, Pass


class VideoTransformer(Protocol):
    """An nn.Module that predicts the velocity of a noisy latent, written for one device.

    config: complete, as diffusers writes it. blocks: in execution order, in one numbering whatever their kinds. units:
    the modules that FSDP gathers as units, in the order of their first use.
    """

    config: Mapping[str, Any]
    blocks: list[nn.Module]
    units: list[nn.Module]

    def arrange(self, operators: PlainOperators, sequence: SequenceLayout | None = None) -> None:
        """Sets the operators, and how the tokens are spread over ranks (None: all tokens are on this rank)."""

    def forward(self, latent: Tensor, timestep: Tensor, context: Any, passing: Pass = EVERYTHING) -> Tensor:
        """The velocity [B,C_out,T,H,W] of a latent [B,C,T,H,W].

        timestep, context: as the family's conditioner makes them. passing: decides which blocks are computed.
        """

    def forget(self) -> None:
        """Frees what is cached between the steps of one generation."""


class KeptTables:
    """The rotary tables of the latest sizes: a call for a part of the picture takes turns with one for the whole."""

    MOST = 4

    def __init__(self):
        self._tables: dict[Hashable, RotaryTable] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def get(self, key: Hashable, make: Callable[[], RotaryTable]) -> RotaryTable:
        """The table of this key, made if it is not kept."""
        table = self._tables.pop(key, None)
        self._tables[key] = table = make() if table is None else table
        if len(self._tables) > self.MOST:
            del self._tables[next(iter(self._tables))]
        return table

    def clear(self) -> None:
        self._tables.clear()
