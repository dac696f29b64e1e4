"""Predicts the bytes that a job holds on devices and on the host."""

from __future__ import annotations

from .facts import Arrangement, Machine, Memory, Model, Video


def predicted(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rank: int | None = None
) -> Memory:
    """What a job holds at the peak of each stage. rank: on this rank; None: on the one that takes the most."""
    raise NotImplementedError
