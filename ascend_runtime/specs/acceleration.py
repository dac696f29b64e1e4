"""Frozen, validated descriptions of a job's accelerators: caches and sparse attention. They do not import torch.

Steps and blocks are counted from 0. A step's number decides what it reuses, not a count of calls. So guidance in
series, a second expert or a warm-up does not shift the schedule.
"""

from __future__ import annotations

import math
from typing import Iterable

from msgspec.structs import replace

from .base import Spec

STEP_CACHES = ("fbcache", "teacache", "magcache", "taylorseer")
# Step caches that need values calibrated for the model -> the field of `Calibration` that they read.
CALIBRATED = {"teacache": "coefficients", "magcache": "ratios"}
UNKNOWN = "nothing is known"  # reported as the source of a calibration that is missing
RAINFUSIONS = ("v1", "v2", "v3")
METHOD_FIELDS = {"step_cache": "method", "rainfusion": "version"}  # accelerator -> the field that selects its algorithm
# Fractions of a job's steps, as in the original systems: reuse starts and ends (steps 12 and 37 of 40), and attention
# stays dense at the beginning (a quarter).
START, END, DENSE = 0.3, 0.925, 0.25
# Published default thresholds of the step caches, and MagCache's further defaults.
THRESHOLDS = {"fbcache": 0.05, "teacache": 0.15, "magcache": 0.04}
MAGCACHE_RETENTION, MAGCACHE_MOST = 0.2, 2
TAYLORSEER_FIRST = 3
MAX_STEPS = 1000


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


class Window(Spec, frozen=True, kw_only=True):
    """The steps and blocks in which a cache stores and reuses results.

    A step reuses if start < step <= end and step - start is not a multiple of interval (MindIE SD's formula for its
    AttentionCache). The step before it stores.
    start, end: None is 30 % and 92.5 % of a job's steps (the original uses steps 12 and 37 of 40).
    interval: 1 reuses nothing.
    first_block, last_block: both included. last_block None is the model's last block.
    """

    start: int | None = None
    end: int | None = None
    interval: int = 4
    first_block: int = 0
    last_block: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("start", "end", "first_block", "last_block"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_STEPS, f"{name} is {value}; give 0 to {MAX_STEPS}.")
        _require(
            1 <= self.interval <= MAX_STEPS,
            f"interval is {self.interval}; give 1 to {MAX_STEPS}: with 4, three of four steps reuse; with 1, none.",
        )
        _require(
            self.start is None or self.end is None or self.start <= self.end,
            f"start is {self.start} and end is {self.end}; end must not come before start.",
        )
        _require(
            self.last_block is None or self.first_block <= self.last_block,
            f"first_block is {self.first_block} and last_block is {self.last_block}; the last must not come before "
            "the first.",
        )

    def bounds(self, steps: int) -> tuple[int, int]:
        """start and end for a job with `steps` steps."""
        start = round(START * steps) if self.start is None else self.start
        return start, round(END * steps) if self.end is None else self.end

    def stores(self, step: int, steps: int) -> bool:
        """Whether this step's result, computed or reused, is kept for the next step."""
        return step + 1 < steps and self.reuses(step + 1, steps)

    def reuses(self, step: int, steps: int) -> bool:
        start, end = self.bounds(steps)
        return start < step <= end and (step - start) % self.interval != 0

    def reused(self, steps: int) -> list[int]:
        """The numbers of the steps that reuse a stored result."""
        return [step for step in range(steps) if self.reuses(step, steps)]

    def blocks(self, count: int) -> range:
        """The cached blocks of a model with `count` blocks. Raises ValueError if there are none."""
        _require(
            self.first_block < count,
            f"first_block is {self.first_block}, but this model has {count} blocks, 0 to {count - 1}.",
        )
        return range(self.first_block, count if self.last_block is None else min(self.last_block + 1, count))


class AttentionCacheSpec(Window, frozen=True, kw_only=True):
    """Reuses the output of each block's self-attention.

    ratio: a target speed-up of the denoise loop. Above 1, it replaces start and interval: the smallest interval, and
    for it the latest start, that save enough FLOPs.
    """

    ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.ratio is None or 1 <= self.ratio <= 10,
            f"ratio is {self.ratio}; give a speed-up from 1 to 10, or None for start, end and interval as they are.",
        )

    def windowed(self, steps: int, share: float) -> Window:
        """The window that reaches `ratio`. share: the fraction of a step's FLOPs that a reusing step skips.

        Raises ValueError if no window reaches it.
        """
        given = {name: getattr(self, name) for name in ("start", "end", "interval", "first_block", "last_block")}
        if self.ratio is None or self.ratio == 1:
            return Window(**given)
        needed = math.ceil(steps * (1 - 1 / self.ratio) / share - 1e-9)
        _, end = self.bounds(steps)
        end = min(end, steps - 1)
        least = max(self.interval, 2)
        for interval in range(least, max(least, steps) + 1):
            for start in range(end - 1, -1, -1):
                window = Window(**given | {"start": start, "end": end, "interval": interval})
                if len(window.reused(steps)) >= needed:
                    return window
        most = 1 / (1 - share * end / steps)
        raise ValueError(
            f"ratio is {self.ratio}, but attention is {share:.0%} of this job's FLOPs: reusing it in every step from 1 "
            f"to {end} of {steps} gives a speed-up of {most:.2f} at most. Lower the ratio, or use a step cache."
        )


class BlockCacheSpec(Window, frozen=True, kw_only=True):
    """Reuses the residual that a range of blocks adds to the tokens (MindIE SD's DiTBlockCache)."""


class Preset(Spec, frozen=True, kw_only=True):
    """The preset that a spec's values come from. given: the fields whose values replace the preset's. A family's own
    values of a preset replace the others (see `presets.for_family`)."""

    name: str
    given: tuple[str, ...] = ()


class StepCacheSpec(Spec, frozen=True, kw_only=True):
    """Skips steps: reuses the residual that all blocks add to the tokens while it is expected to change little.

    method:
        fbcache: first-block cache. Skips while the relative change of the first block's residual, since the last
            computed step, is below `threshold`.
        teacache: skips until the accumulated relative changes of the family's indicator (`block_stack.BlockStack`),
            rescaled by a polynomial, reach `threshold`.
        magcache: skips until the accumulated error, predicted from calibrated magnitude ratios, reaches `threshold`.
        taylorseer: computes every `interval`-th step, and predicts the others by a Taylor expansion of `order`.
    threshold: None is the method's default (THRESHOLDS). 0 skips nothing.
    first_steps: each expert's first steps, which are always computed (None: 1; a fifth of its steps for MagCache; 3 for
        TaylorSeer, to fit its expansion). last_steps: the job's last steps, which are always computed.
    most: the maximum number of consecutive skipped steps (None: no limit; 2 for MagCache).
    preset: set by `presets.chosen`.
    """

    method: str = "fbcache"
    threshold: float | None = None
    first_steps: int | None = None
    last_steps: int = 1
    most: int | None = None
    interval: int = 4
    order: int = 1
    preset: Preset | None = None

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.method in STEP_CACHES, f"method is {self.method!r}; it can be one of {', '.join(STEP_CACHES)}."
        )
        _require(
            self.threshold is None or 0 <= self.threshold <= 100,
            f"threshold is {self.threshold}; give 0 (no step is skipped) to 100.",
        )
        for name, least, highest in (("first_steps", 1, MAX_STEPS), ("last_steps", 0, MAX_STEPS),
                                     ("most", 1, MAX_STEPS), ("interval", 1, MAX_STEPS), ("order", 0, 4)):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or least <= value <= highest, f"{name} is {value}; give {least} to {highest}.")

    @property
    def limit(self) -> float:
        """The threshold to apply. TaylorSeer has none: infinity, or 0 to skip nothing."""
        return THRESHOLDS.get(self.method, math.inf) if self.threshold is None else self.threshold

    def beginning(self, steps: int) -> int:
        """The number of an expert's first steps that are always computed."""
        if self.first_steps is not None:
            return self.first_steps
        own = {"magcache": max(1, round(MAGCACHE_RETENTION * steps)), "taylorseer": TAYLORSEER_FIRST}
        return own.get(self.method, 1)

    @property
    def in_a_row(self) -> int:
        """The maximum number of consecutive skipped steps."""
        most = MAGCACHE_MOST if self.method == "magcache" else MAX_STEPS
        if self.most is not None:
            most = self.most
        return min(most, self.interval - 1) if self.method == "taylorseer" else most


class Calibration(Spec, frozen=True, kw_only=True):
    """Values that step caches need for one expert of a model (see `python -m ascend_runtime calibrate`).

    coefficients: TeaCache's polynomial, highest power first. It maps the relative change of the family's indicator
        (`block_stack.BlockStack`) to the relative change of the blocks' output.
    ratios: MagCache's magnitude ratios: for each step, the norm of the blocks' residual divided by that of the step
        before. The first is 1.
    source: where the values come from, as text.
    """

    coefficients: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    source: str = UNKNOWN

    def __post_init__(self):
        super().__post_init__()
        numbers = (*self.coefficients, *self.ratios)
        _require(all(map(math.isfinite, numbers)), "a calibration has a number that is not finite.")

    def source_for(self, method: str) -> str:
        """The source of the values that a step cache reads; UNKNOWN if they are missing."""
        return self.source if getattr(self, CALIBRATED[method]) else UNKNOWN

    def ratios_of(self, steps: int) -> list[float]:
        """The ratios resampled, by nearest neighbour, to the number of steps that the expert has in a job."""
        scale = (len(self.ratios) - 1) / max(steps - 1, 1)
        return [1.0, *(self.ratios[round(step * scale)] for step in range(1, steps))]


class RainFusionSpec(Spec, frozen=True, kw_only=True):
    """Sparse self-attention: computes only some mask blocks of the attention matrix.

    version:
        v1: each head uses a band in time order or a band in space order, whichever covers more of its softmax.
        v2: bricks of 2 x 8 x 8 tokens attend to the bricks whose mean keys match their mean query best.
        v3: as v2, with tiles of 8 x 8 tokens of one frame.
    sparsity: the fraction of mask blocks to skip, not counting those that are always dense. 0 skips none.
    start: the first sparse step; None starts after a quarter of the steps. refresh: steps for which a mask is kept.
    first_blocks, last_blocks: the numbers of blocks at both ends of the block stack that stay dense.
    """

    version: str = "v2"
    sparsity: float = 0.64
    start: int | None = None
    refresh: int = 1
    first_blocks: int = 0
    last_blocks: int = 0

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.version in RAINFUSIONS, f"version is {self.version!r}; it can be one of {', '.join(RAINFUSIONS)}."
        )
        _require(0 <= self.sparsity < 1, f"sparsity is {self.sparsity}; give 0 (dense) to less than 1.")
        for name, least in (("start", 0), ("refresh", 1), ("first_blocks", 0), ("last_blocks", 0)):
            value = getattr(self, name)
            _require(value is None or least <= value <= MAX_STEPS, f"{name} is {value}; give {least} to {MAX_STEPS}.")

    def begins(self, steps: int) -> int:
        """The first sparse step of a job with `steps` steps."""
        return round(DENSE * steps) if self.start is None else self.start

    def sparse_in(self, step: int, steps: int, block: int, blocks: int) -> bool:
        return step >= self.begins(steps) and self.first_blocks <= block < blocks - self.last_blocks


class AccelerationSpec(Spec, frozen=True, kw_only=True):
    """The accelerators of a job; None switches one off. At most one cache, as each caches what the others compute.

    measure: computes everything, and records how much the steps change (`acceleration.measuring`), for a calibration.
    """

    attention_cache: AttentionCacheSpec | None = None
    block_cache: BlockCacheSpec | None = None
    step_cache: StepCacheSpec | None = None
    rainfusion: RainFusionSpec | None = None
    measure: bool = False

    def __post_init__(self):
        super().__post_init__()
        caches = [name for name in ("attention_cache", "block_cache", "step_cache") if getattr(self, name) is not None]
        _require(
            len(caches) < 2,
            f"{_words(caches)} are given; use only one of them, as each reuses results that the other needs computed. "
            "RainFusion can be combined with any cache.",
        )
        _require(
            not self.measure or not caches and self.rainfusion is None,
            "measure is given together with an accelerator; measuring needs every step computed in full. Remove one.",
        )

    @property
    def cache(self) -> str | None:
        """The name of the one cache that is set, or None."""
        names = ("attention_cache", "block_cache", "step_cache")
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def kinds(self) -> dict[str, str]:
        """Accelerator -> its method or version, "" if it has only one."""
        given = {name: getattr(self, name) for name in ("attention_cache", "block_cache", "step_cache", "rainfusion")}
        given = {name: spec for name, spec in given.items() if spec is not None}
        return {name: getattr(spec, METHOD_FIELDS.get(name, ""), "") for name, spec in given.items()}

    def with_accelerator(self, kind: str, spec: Spec) -> AccelerationSpec:
        """A copy with one more accelerator. Raises ValueError for two of one kind, and for two caches."""
        _require(getattr(self, kind) is None, f"{_words([kind])} is given twice; use only one.")
        return replace(self, **{kind: spec})


def _words(names: Iterable[str]) -> str:
    return " and ".join(name.replace("_", " ") for name in names)
