"""How a job may compute less than all: frozen descriptions, validated when they are made, free of torch.

Steps and blocks are counted from 0. What a step reuses hangs on its number alone, never on how often something was
called: guidance in series, a second expert or a warm-up shift nothing.
"""

from __future__ import annotations

import math
from typing import Iterable

from msgspec.structs import replace

from .base import Spec

STEP_CACHES = ("fbcache", "teacache", "magcache", "taylorseer")
# Those that have to know something of the model beforehand, and what; and what is told where they do not.
CALIBRATED = {"teacache": "coefficients", "magcache": "ratios"}
UNKNOWN = "nothing is known"
RAINFUSIONS = ("v1", "v2", "v3")
WAYS = {"step_cache": "method", "rainfusion": "version"}  # fields that say how, where there are several ways
# Shares of a job's steps that the original systems reuse between (12 and 37 of 40), and that they compute densely (a
# quarter) before attention is sparse.
START, END, DENSE = 0.3, 0.925, 0.25
# How much each step cache lets pass (the published defaults), and what more MagCache has of its own.
THRESHOLDS = {"fbcache": 0.05, "teacache": 0.15, "magcache": 0.04}
MAGCACHE_RETENTION, MAGCACHE_MOST = 0.2, 2
TAYLORSEER_FIRST = 3
MAX_STEPS = 1000


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


class Window(Spec, frozen=True, kw_only=True):
    """Steps and blocks in which something is stored and reused.

    A step reuses where start < step <= end and interval does not divide step - start (MindIE SD's formula for its
    AttentionCache); what the step before such ones computes is kept for them. start, end: None is 30 % and 92.5 % of a
    job's steps, as the original's 12 and 37 of 40. interval: 1 reuses nothing.
    first_block, last_block: both included; None: the first, the last.
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
        """start and end for a job of so many steps."""
        start = round(START * steps) if self.start is None else self.start
        return start, round(END * steps) if self.end is None else self.end

    def stores(self, step: int, steps: int) -> bool:
        """Whether what a step computes, or reuses, is kept for the next one."""
        return step + 1 < steps and self.reuses(step + 1, steps)

    def reuses(self, step: int, steps: int) -> bool:
        start, end = self.bounds(steps)
        return start < step <= end and (step - start) % self.interval != 0

    def reused(self, steps: int) -> list[int]:
        """The steps that reuse."""
        return [step for step in range(steps) if self.reuses(step, steps)]

    def blocks(self, count: int) -> range:
        """The blocks of `count` that take part. Raises ValueError where there are none."""
        _require(
            self.first_block < count,
            f"first_block is {self.first_block}, but this model has {count} blocks, 0 to {count - 1}.",
        )
        return range(self.first_block, count if self.last_block is None else min(self.last_block + 1, count))


class AttentionCacheSpec(Window, frozen=True, kw_only=True):
    """The output of a block's self-attention is reused.

    ratio: where it is above 1, a speed-up of the denoise loop that is wanted: start is then the latest step, and
    interval the smallest, by which the FLOPs left out come to it.
    """

    ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.ratio is None or 1 <= self.ratio <= 10,
            f"ratio is {self.ratio}; give a speed-up from 1 to 10, or None for start, end and interval as they are.",
        )

    def windowed(self, steps: int, share: float) -> Window:
        """The steps and blocks that `ratio` asks for. share: of a step's FLOPs, what a step that reuses leaves out.

        Raises ValueError where no window reaches it.
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
            f"ratio is {self.ratio}, but attention is {share:.0%} of this job's work: reused in every step from 1 to "
            f"{end} of {steps}, it makes the loop {most:.2f} times as fast at most. Ask for less, or take a step cache."
        )


class BlockCacheSpec(Window, frozen=True, kw_only=True):
    """What a range of blocks adds to the tokens is reused (MindIE SD's DiTBlockCache)."""


class StepCacheSpec(Spec, frozen=True, kw_only=True):
    """What all blocks add to the tokens is reused, as long as it seems to change little.

    method:
        fbcache: first-block cache: as long as what the first block adds differs by less than `threshold` of itself from
            what it added in the last step that was computed.
        teacache: until a polynomial of the timestep embedding's relative changes, summed up, reaches `threshold`.
        magcache: until the errors that known magnitudes of the changes foretell come to `threshold`.
        taylorseer: in all but every `interval`-th step, foretold by a Taylor expansion of `order` from those before.
    threshold: None: the method's own (THRESHOLDS). 0: nothing is left out.
    first_steps: of each expert, always computed (None: 1; a fifth of them for MagCache; 3 for TaylorSeer, which learns
        from them how steps go on). last_steps: of the job.
    most: steps in a row that may be left out (None: any number; 2 for MagCache).
    """

    method: str = "fbcache"
    threshold: float | None = None
    first_steps: int | None = None
    last_steps: int = 1
    most: int | None = None
    interval: int = 4
    order: int = 1

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.method in STEP_CACHES, f"method is {self.method!r}; it can be one of {', '.join(STEP_CACHES)}."
        )
        _require(
            self.threshold is None or 0 <= self.threshold <= 100,
            f"threshold is {self.threshold}; give 0 (nothing is left out) to 100.",
        )
        for name, least, highest in (("first_steps", 1, MAX_STEPS), ("last_steps", 0, MAX_STEPS),
                                     ("most", 1, MAX_STEPS), ("interval", 1, MAX_STEPS), ("order", 0, 4)):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or least <= value <= highest, f"{name} is {value}; give {least} to {highest}.")

    @property
    def limit(self) -> float:
        """The threshold; of TaylorSeer, which has none, 0 where it is to leave nothing out."""
        return THRESHOLDS.get(self.method, math.inf) if self.threshold is None else self.threshold

    def beginning(self, steps: int) -> int:
        """How many of an expert's steps are computed before any is left out."""
        if self.first_steps is not None:
            return self.first_steps
        own = {"magcache": max(1, round(MAGCACHE_RETENTION * steps)), "taylorseer": TAYLORSEER_FIRST}
        return own.get(self.method, 1)

    @property
    def in_a_row(self) -> int:
        """The most steps that may be left out, one after the other."""
        most = MAGCACHE_MOST if self.method == "magcache" else MAX_STEPS
        if self.most is not None:
            most = self.most
        return min(most, self.interval - 1) if self.method == "taylorseer" else most


class Calibration(Spec, frozen=True, kw_only=True):
    """What step caches know of one expert of a model (see `python -m ascend_runtime calibrate`).

    coefficients: of a polynomial, the highest power's first: from the relative change of the timestep embedding to that
        of what the blocks make (TeaCache).
    ratios: of each of its steps, how large what the blocks add is beside the step before (MagCache); the first is 1.
    source: where these are from, in words.
    """

    coefficients: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    source: str = UNKNOWN

    def __post_init__(self):
        super().__post_init__()
        numbers = (*self.coefficients, *self.ratios)
        _require(all(map(math.isfinite, numbers)), "a calibration has a number that is not finite.")

    def source_for(self, method: str) -> str:
        """Where what a step cache needs is from: one may be known and the other not."""
        return self.source if getattr(self, CALIBRATED[method]) else UNKNOWN

    def ratios_of(self, steps: int) -> list[float]:
        """Those of a job in which the expert has so many steps: of each, the nearest one's."""
        scale = (len(self.ratios) - 1) / max(steps - 1, 1)
        return [1.0, *(self.ratios[round(step * scale)] for step in range(1, steps))]


class RainFusionSpec(Spec, frozen=True, kw_only=True):
    """Self-attention computes a part of its products.

    version:
        v1: each head attends near by, or to a pattern over all of the video, whichever holds more of its softmax.
        v2: bricks of 2 x 8 x 8 tokens attend to those bricks that match them best on the average.
        v3: the same with tiles of 8 x 8 tokens of a frame; which ones, is kept for `refresh` steps.
    sparsity: share of the products that is left out, before what is always dense. 0: none.
    start: the first step that is sparse; None: a quarter of the steps. first_blocks, last_blocks: always dense.
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
        """The first sparse step of a job of so many."""
        return round(DENSE * steps) if self.start is None else self.start

    def sparse_in(self, step: int, steps: int, block: int, blocks: int) -> bool:
        return step >= self.begins(steps) and self.first_blocks <= block < blocks - self.last_blocks


class AccelerationSpec(Spec, frozen=True, kw_only=True):
    """What a job leaves out; None: nothing of that kind. One cache at most, as they reuse parts of one another.

    measure: leaves nothing out, and notes how the steps change (`accelerate.measuring`), for a calibration.
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
            f"{_words(caches)} are given; take one of them: each reuses what the other would have to compute. "
            "RainFusion goes with any.",
        )
        _require(
            not self.measure or not caches and self.rainfusion is None,
            "measure is given beside what is to be left out; what is measured must be computed whole.",
        )

    @property
    def cache(self) -> str | None:
        """The name of the one cache that is asked for."""
        names = ("attention_cache", "block_cache", "step_cache")
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def kinds(self) -> dict[str, str]:
        """What is asked for, by name: its method or version, "" for what knows one way."""
        given = {name: getattr(self, name) for name in ("attention_cache", "block_cache", "step_cache", "rainfusion")}
        return {name: getattr(spec, WAYS.get(name, ""), "") for name, spec in given.items() if spec is not None}

    def beside(self, kind: str, spec: Spec) -> AccelerationSpec:
        """This and one more. Raises ValueError for two of a kind, and for two caches."""
        _require(getattr(self, kind) is None, f"Two of {_words([kind])} are given; take one of them.")
        return replace(self, **{kind: spec})


def _words(names: Iterable[str]) -> str:
    return " and ".join(name.replace("_", " ") for name in names)
