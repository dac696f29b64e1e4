"""The videos that are nearest to one that does not fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from ...specs import VaeForm, VideoSize
from ..facts import Video

IsFitting = Callable[[VideoSize], bool]
SHORTEST_SIDE = 128  # pixels of the shorter side of a picture that is proposed


def video_size(video: Video, form: VaeForm) -> VideoSize:
    frames, height, width, _ = form.decoded_shape((1, *video.shape[1:]))
    return VideoSize(width=width, height=height, num_frames=frames)


def with_fewer_frames(size: VideoSize, form: VaeForm, is_fitting: IsFitting) -> VideoSize | None:
    """The most frames of this picture that fit, and no more than `size` has; None: not even one does."""
    numbers = range(size.num_frames, 0, -form.temporal)
    return _first([_with(size, num_frames=number) for number in numbers], is_fitting)


def with_smaller_picture(size: VideoSize, form: VaeForm, is_fitting: IsFitting) -> VideoSize | None:
    """The largest picture of about the same proportions that fits, with this number of frames."""
    return _first(pictures(size, form), is_fitting)


def pictures(size: VideoSize, form: VaeForm) -> list[VideoSize]:
    """Smaller and smaller pictures of about the same proportions, the first of which is `size`'s own. The shorter side
    falls by the smallest number of pixels that a model can make."""
    step, short, long = form.multiple, *sorted((size.width, size.height))
    found = [size]
    for side in range(short // step * step, SHORTEST_SIDE - 1, -step):
        other = max(step, round(side * long / short / step) * step)
        width, height = (other, side) if size.width >= size.height else (side, other)
        found.append(_with(size, width=width, height=height))
    return list(dict.fromkeys(found))


def _with(size: VideoSize, **changed: int) -> VideoSize:
    return VideoSize(**({"width": size.width, "height": size.height, "num_frames": size.num_frames} | changed))


def _first(sizes: Sequence[VideoSize], is_fitting: IsFitting) -> VideoSize | None:
    """The first that fits; each is smaller than the one before it, so that all after one that fits fit too."""
    at = bisect_left(sizes, True, key=is_fitting)
    return sizes[at] if at < len(sizes) else None
