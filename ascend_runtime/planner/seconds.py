"""Predicts the seconds of each stage of a job."""

from __future__ import annotations

from collections.abc import Mapping

from .facts import Arrangement, Machine, Model, Video
from .rates import Rates


def predicted(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rates: Rates
) -> Mapping[str, float]:
    """By stage: "load" (all files, from disk), "encode" (both prompts), "denoise", "decode"."""
    raise NotImplementedError
