"""Chooses the fastest arrangement that fits."""

from __future__ import annotations

from dataclasses import dataclass

from ..specs import ParallelSpec, VideoSize
from .facts import Machine, Model, Prediction, Video
from .rates import Rates


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; "auto", None or 0 is left to the planner."""

    parallel: ParallelSpec = ParallelSpec()
    experts: str = "auto"
    encoder: str = "auto"
    tiles: str = "auto"


@dataclass(frozen=True)
class Choice:
    """fitting: the arrangements that fit, the fastest first, which is chosen. others: those that do not fit."""

    fitting: tuple[Prediction, ...]
    others: tuple[Prediction, ...] = ()

    @property
    def chosen(self) -> Prediction:
        return self.fitting[0]

    @property
    def line(self) -> str:
        """What was chosen, why, and what it is predicted to take, in one line."""
        raise NotImplementedError


def choose(model: Model, video: Video, machine: Machine, rates: Rates, fixed: Fixed = Fixed()) -> Choice:
    """Nothing that changes a video's values is ever chosen. Raises ValueError, with the numbers and the nearest size
    that fits, if nothing fits."""
    raise NotImplementedError


def nearest_size(model: Model, video: Video, machine: Machine, fixed: Fixed = Fixed()) -> VideoSize | None:
    """The largest video of about the same proportions that fits; None: no video does."""
    raise NotImplementedError
