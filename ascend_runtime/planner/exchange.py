"""Predicts the bytes that a rank sends in a step, along each axis of the mesh."""

from __future__ import annotations

from collections.abc import Mapping

from .facts import Arrangement, Model, Video


def sent(model: Model, video: Video, arrangement: Arrangement) -> Mapping[str, int]:
    """Bytes that rank 0 sends in a step with guidance, by mesh axis, and "fsdp"."""
    raise NotImplementedError
