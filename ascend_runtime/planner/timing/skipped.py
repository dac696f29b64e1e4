"""What accelerators leave out of each step, as far as it is known before the job.

Step caches that look at the tokens (fbcache, teacache, magcache) decide during the job: they count as computing all.
"""

from __future__ import annotations

from typing import NamedTuple

from ...models.cost import Work
from ...specs import AccelerationSpec, AttentionCacheSpec, StepCacheSpec
from ..facts import Video


class StepPart(NamedTuple):
    """The fractions of a step that are computed. blocks: of all blocks. attention: of these blocks' self-attention.
    density: of the attention matrix."""

    blocks: float = 1.0
    attention: float = 1.0
    density: float = 1.0


ALL = StepPart()


def kept_in_steps(video: Video, work: Work) -> list[StepPart]:
    """For each step of the video. work: of a pass."""
    spec = video.acceleration
    return [
        StepPart(blocks, attention, density)
        for blocks, attention, density in zip(_blocks(spec, video, work), _attention(spec, video, work),
                                              _density(spec, video, work))
    ]  # fmt: skip


def _blocks(spec: AccelerationSpec, video: Video, work: Work) -> list[float]:
    count = len(work.blocks)
    if spec.block_cache is not None:
        left = 1 - len(spec.block_cache.blocks(count)) / count
        return [left if spec.block_cache.reuses(step, video.steps) else 1.0 for step in range(video.steps)]
    if spec.step_cache is not None and spec.step_cache.method == "taylorseer":
        return [float(step not in _predicted_steps(spec.step_cache, video)) for step in range(video.steps)]
    return [1.0] * video.steps


def _predicted_steps(spec: StepCacheSpec, video: Video) -> set[int]:
    """The steps that TaylorSeer predicts: as many in a row as it may, but not each expert's first nor the last ones."""
    predicted: set[int] = set()
    if not spec.limit:
        return predicted
    for expert in {number for number, _ in video.passes}:
        own = [step for step, (number, _) in enumerate(video.passes) if number == expert]
        row = 0
        for step in own[spec.beginning(len(own)) :]:
            row = row + 1 if row < spec.in_a_row and step < video.steps - spec.last_steps else 0
            predicted |= {step} if row else set()
    return predicted


def _attention(spec: AccelerationSpec, video: Video, work: Work) -> list[float]:
    cache = spec.attention_cache
    if cache is None:
        return [1.0] * video.steps
    window, left = _window(cache, video, work), 1 - len(cache.blocks(len(work.blocks))) / len(work.blocks)
    return [left if window.reuses(step, video.steps) else 1.0 for step in range(video.steps)]


def _window(cache: AttentionCacheSpec, video: Video, work: Work):
    blocks = cache.blocks(len(work.blocks))
    return cache.windowed(video.steps, sum(work.blocks[block].attention for block in blocks) / work.whole)


def _density(spec: AccelerationSpec, video: Video, work: Work) -> list[float]:
    """Of a sparse step: all but `sparsity`, and of that the rows and columns of the first frame, which are dense."""
    sparse = spec.rainfusion
    if sparse is None:
        return [1.0] * video.steps
    count = len(work.blocks)
    dense = 1 - sparse.sparsity * (1 - 2 / max(video.shape[2], 2))
    blocks = max(0, count - sparse.first_blocks - sparse.last_blocks) / count
    return [1 - blocks * (1 - dense) if step >= sparse.begins(video.steps) else 1.0 for step in range(video.steps)]
