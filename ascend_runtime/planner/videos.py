"""The video that a job makes, as the planner sees it."""

from __future__ import annotations

from ..specs import AccelerationSpec, SampleSpec, VideoSize
from .facts import Model, Video


def video_of(
    model: Model, size: VideoSize, sample: SampleSpec = SampleSpec(), acceleration: AccelerationSpec = AccelerationSpec()
) -> Video:
    """A video of this size. sample: what it leaves open is the model's own."""
    raise NotImplementedError
