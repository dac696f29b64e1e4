"""The accelerators of one job on this rank: what its description asks for, checked, and asked at every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from torch import Tensor

from ..models.cost import Work
from ..models.shared.block_stack import EVERYTHING, At, Attend, BlockStack, Pass
from ..ops import PlainOperators
from ..specs import AccelerationSpec, AttentionCacheSpec, Calibration, StepCacheSpec, Window
from ..specs.acceleration import CALIBRATED
from .attention_cache import AttentionCache
from .block_cache import BlockCache
from .measuring import Measuring
from .rainfusion import RainFusion
from .step_cache import Rule, StepCache
from .step_rules import Always, FirstBlock, MagCache, TeaCache
from .tally import Tally

StackCache = BlockCache | StepCache | Measuring
AS_THEY_ARE = (1.0, 0.0)  # TeaCache's polynomial where none is known: the timestep's changes as they are


@dataclass(frozen=True)
class Outline:
    """A job as its accelerators see it.

    experts: of each step, the expert that works in it. known: of each expert, what was found out beforehand.
    grid: tokens of a video, as frames, rows and columns. own: how many of them this rank has, at the beginning of its
    chunk; a text's tokens may follow them.
    branches: of guidance, that this rank computes.
    output: bytes of one block's output [B, S, D] on this rank. room: bytes that it can keep things in.
    ring: ranks of the ring, 1 where there is none.
    """

    experts: tuple[str, ...]
    known: dict[str, Calibration]
    grid: tuple[int, int, int]
    own: int
    branches: int
    output: int
    room: int
    ring: int
    work: Work

    @property
    def steps(self) -> int:
        return len(self.experts)

    def steps_of(self, expert: str) -> list[int]:
        return [step for step, one in enumerate(self.experts) if one == expert]


class Acceleration:
    """Raises ValueError, before anything is computed, for what this job cannot have."""

    def __init__(self, spec: AccelerationSpec, outline: Outline, operators: PlainOperators = PlainOperators()):
        self.spec = spec
        self.tally = Tally(outline.work)
        self._caches = {expert: _caches(spec, outline, expert, self.tally) for expert in dict.fromkeys(outline.experts)}
        self._known = {expert: outline.known.get(expert, Calibration()) for expert in self._caches}
        self._make_rainfusion = lambda: _rainfusion(spec, outline, operators, self.tally)
        self._rainfusion = self._make_rainfusion()
        self._expert: str | None = None

    def passing(self, at: At) -> Pass:
        """The pass that is about to begin. An expert begins with nothing kept, and the one before it lets go of all: it
        does not come back."""
        if self._expert not in (None, at.expert):
            self._caches.pop(self._expert)
            self._rainfusion = self._make_rainfusion()
        self._expert = at.expert
        self.tally.began(at)
        if self.spec == AccelerationSpec():
            return EVERYTHING
        return _Pass(at, *self._caches[at.expert], self._rainfusion)

    def facts(self) -> dict[str, object]:
        """What was asked for and what it left out so far; nothing where nothing was asked for."""
        if self.spec == AccelerationSpec():
            return {}
        told = {"accelerators": self.spec.kinds, **self.tally.facts()}
        method = self.spec.kinds.get("step_cache")
        if method in CALIBRATED:
            told["calibration"] = {expert: known.source_for(method) for expert, known in self._known.items()}
        return {"acceleration": told}


class _Pass(Pass):
    def __init__(
        self, at: At, attention: AttentionCache | None, stack: StackCache | None, rainfusion: RainFusion | None
    ):
        self._at, self._attention, self._stack, self._rainfusion = at, attention, stack, rainfusion

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        return super().blocks(stack, tokens) if self._stack is None else self._stack.blocks(self._at, stack, tokens)

    def attention(self, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        def computed() -> Tensor:
            if self._rainfusion is None:
                return compute(None)
            return self._rainfusion.attention(self._at, block, compute)

        return computed() if self._attention is None else self._attention.attention(self._at, block, computed)


def _caches(
    spec: AccelerationSpec, outline: Outline, expert: str, tally: Tally
) -> tuple[AttentionCache | None, StackCache | None]:
    """What is asked at each attention, and what at each pass, of one expert."""
    steps, blocks = outline.steps, len(outline.work.blocks)
    if spec.attention_cache is not None:
        return AttentionCache(_window(spec.attention_cache, outline), steps, blocks, tally), None
    if spec.block_cache is not None:
        return None, BlockCache(spec.block_cache, steps, blocks, tally)
    if spec.step_cache is not None:
        return None, _step_cache(spec.step_cache, outline, expert, tally)
    return None, Measuring(outline.own, tally) if spec.measure else None


def _step_cache(spec: StepCacheSpec, outline: Outline, expert: str, tally: Tally) -> StepCache:
    own = outline.steps_of(expert)
    always = {*own[: spec.beginning(len(own))], *range(outline.steps - spec.last_steps, outline.steps)}
    order = spec.order if spec.method == "taylorseer" else 0
    needed = (outline.branches * (order + 1) + 2) * outline.output  # two: what is compared, or was learnt before
    if needed > outline.room:
        raise ValueError(
            f"The step cache {spec.method} would keep {needed / 1e9:.1f} GB on a rank, and {outline.room / 1e9:.1f} GB "
            "are free beside what a pass takes. Spread the video over more ranks (ulysses_degree, or cfg_degree 2), "
            "make it smaller"
            + (", or give a lower order." if order else ".")
        )
    return StepCache(_rule(spec, outline, expert), always, spec.in_a_row, order, tally)


def _rule(spec: StepCacheSpec, outline: Outline, expert: str) -> Rule:
    known = outline.known.get(expert, Calibration())
    if spec.method == "fbcache":
        return FirstBlock(spec.limit, outline.own)
    if spec.method == "teacache":
        return TeaCache(spec.limit, known.coefficients or AS_THEY_ARE, outline.own)
    if spec.method == "taylorseer":
        return Always(spec.limit)
    if not known.ratios:
        raise ValueError(
            "MagCache has to know how large what the blocks add is in each step, and nothing is known of this model. "
            "Run `python -m ascend_runtime calibrate MODEL` once, or take fbcache or taylorseer."
        )
    steps = outline.steps_of(expert)
    return MagCache(spec.limit, dict(zip(steps, known.ratios_of(len(steps)))))


def _window(spec: AttentionCacheSpec, outline: Outline) -> Window:
    """Where attention is stored and reused. Raises ValueError where what is stored does not fit."""
    work, kept = outline.work, spec.blocks(len(outline.work.blocks))
    share, blocks = sum(work.blocks[block].attention for block in kept) / work.whole, len(kept)
    window = spec.windowed(outline.steps, share)
    needed = blocks * outline.output * outline.branches
    if window.reused(outline.steps) and needed > outline.room:
        fitting = outline.room // (outline.output * outline.branches)
        raise ValueError(
            f"AttentionCache would keep {needed / 1e9:.1f} GB on a rank, the outputs of {blocks} blocks for "
            f"{outline.branches} branch(es) of guidance, and {outline.room / 1e9:.1f} GB are free beside what a pass "
            "takes. Spread the video over more ranks (ulysses_degree, or cfg_degree 2), make it smaller, take the "
            "block cache or a step cache, which keep little"
            + (f", or let last_block be first_block + {fitting - 1} at most." if fitting else ".")
        )
    return window


def _rainfusion(
    spec: AccelerationSpec, outline: Outline, operators: PlainOperators, tally: Tally
) -> RainFusion | None:
    """Raises ValueError where the ranks or the device have no sparse attention."""
    if spec.rainfusion is None:
        return None
    if outline.ring > 1:
        raise ValueError(
            f"RainFusion needs all tokens of a head on one rank, and ring_degree is {outline.ring}, whose ranks hold "
            "parts of them. Put these ranks on ulysses_degree."
        )
    operators.check_sparse()
    return RainFusion(spec.rainfusion, outline.grid, outline.steps, len(outline.work.blocks), operators, tally)
