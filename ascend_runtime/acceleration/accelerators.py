"""Builds and checks a job's accelerators on this rank, and applies them to every pass through the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from torch import Tensor

from ..errors import coded_error
from ..models.cost import Work
from ..models.shared.block_stack import EVERYTHING, At, Attend, BlockStack, Pass
from ..ops import PlainOperators
from ..planner.holding.accelerators import attentions_kept, expansions_kept
from ..specs import AccelerationSpec, AttentionCacheSpec, Calibration, StepCacheSpec, Window
from ..specs.acceleration import CALIBRATED
from .attention_cache import AttentionCache
from .block_cache import BlockCache
from .measuring import Measuring
from .rainfusion import JobSize, RainFusion
from .step_cache import SkipRule, StepCache
from .step_rules import Always, FirstBlock, MagCache, TeaCache
from .tally import Tally

StackCache = BlockCache | StepCache | Measuring
IDENTITY = (1.0, 0.0)  # TeaCache's polynomial without a calibration: does not rescale the indicator's changes


@dataclass(frozen=True)
class Outline:
    """The properties of a job that its accelerators need.

    experts: the expert of each step. known: the calibration of each expert.
    grid: the tokens of a video as (frames, rows, columns). own: the number of these tokens on this rank, without
    padding; they come first in its chunk, and a text's tokens may follow.
    branches: the number of guidance branches that this rank computes.
    output: the size of one block's output [B, S, D] on this rank, in bytes. room: bytes available for caches.
    ring: the ring degree; 1 without a ring.
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
    """The accelerators of one job on this rank. The constructor raises ValueError if the job cannot use them."""

    def __init__(self, spec: AccelerationSpec, outline: Outline, operators: PlainOperators = PlainOperators()):
        self.spec = spec
        self._is_plain = spec == AccelerationSpec()
        self.tally = Tally(outline.work)
        self._caches = {expert: _caches(spec, outline, expert, self.tally) for expert in dict.fromkeys(outline.experts)}
        self._known = {expert: outline.known.get(expert, Calibration()) for expert in self._caches}
        self._make_rainfusion = lambda: _rainfusion(spec, outline, operators, self.tally)
        self._rainfusion = self._make_rainfusion()
        self._expert: str | None = None

    def passing(self, at: At) -> Pass:
        """Begins a pass. When the expert changes, the previous one's caches are freed: it is not used again."""
        if self._expert not in (None, at.expert):
            self._caches.pop(self._expert, None)
            self._rainfusion = self._make_rainfusion()
        self._expert = at.expert
        self.tally.began(at)
        if self._is_plain:
            return EVERYTHING
        return _Pass(at, *self._caches[at.expert], self._rainfusion)

    def facts(self) -> dict[str, object]:
        """The job's `info["acceleration"]`: its accelerators and what they have skipped so far. Empty without any."""
        if self._is_plain:
            return {}
        facts = {"accelerators": self.spec.kinds, **self.tally.facts()}
        method = self.spec.kinds.get("step_cache")
        if method in CALIBRATED:
            facts["calibration"] = {expert: known.source_for(method) for expert, known in self._known.items()}
        return {"acceleration": facts}


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
    """One expert's cache that is applied at each attention, and the one that is applied to the whole block stack."""
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
    needed = expansions_kept(spec, outline.branches) * outline.output
    if needed > outline.room:
        raise coded_error(
            "AV-1205",
            f"The step cache {spec.method} needs {needed / 1e9:.1f} GB per rank, but only {outline.room / 1e9:.1f} GB "
            "are free after the memory of a pass. Use more ranks per video (ulysses_degree, or cfg_degree 2), or a "
            "smaller video" + (", or a lower order." if order else "."),
        )
    return StepCache(_rule(spec, outline, expert), always, spec.in_a_row, order, tally)


def _rule(spec: StepCacheSpec, outline: Outline, expert: str) -> SkipRule:
    known = outline.known.get(expert, Calibration())
    if spec.method == "fbcache":
        return FirstBlock(spec.limit, outline.own)
    if spec.method == "teacache":
        return TeaCache(spec.limit, known.coefficients or IDENTITY, outline.own)
    if spec.method == "taylorseer":
        return Always(spec.limit)
    if not known.ratios:
        raise coded_error(
            "AV-1416",
            "MagCache needs magnitude ratios, and this model has no calibration. "
            "Run `python -m ascend_runtime calibrate MODEL` once, if it makes videos from text; or use fbcache or "
            "taylorseer.",
        )
    steps = outline.steps_of(expert)
    return MagCache(spec.limit, dict(zip(steps, known.ratios_of(len(steps)))))


def _window(spec: AttentionCacheSpec, outline: Outline) -> Window:
    """The steps and blocks in which attention is reused. Raises ValueError if the cache does not fit into memory."""
    work, kept = outline.work, spec.blocks(len(outline.work.blocks))
    share, blocks = sum(work.blocks[block].attention for block in kept) / work.whole, len(kept)
    window = spec.windowed(outline.steps, share)
    needed = attentions_kept(spec, len(outline.work.blocks), outline.branches) * outline.output
    if window.reused(outline.steps) and needed > outline.room:
        fitting = outline.room // (outline.output * outline.branches)
        raise coded_error(
            "AV-1205",
            f"AttentionCache needs {needed / 1e9:.1f} GB per rank for the outputs of {blocks} blocks and "
            f"{outline.branches} guidance branch(es), but only {outline.room / 1e9:.1f} GB are free after the memory "
            "of a pass. Use more ranks per video (ulysses_degree, or cfg_degree 2), a smaller video, the block cache "
            "or a step cache, which need little memory"
            + (f", or set last_block to first_block + {fitting - 1} at most." if fitting else "."),
        )
    return window


def _rainfusion(
    spec: AccelerationSpec, outline: Outline, operators: PlainOperators, tally: Tally
) -> RainFusion | None:
    """Raises ValueError if the plan or the device does not support sparse attention."""
    if spec.rainfusion is None:
        return None
    if outline.ring > 1:
        raise ValueError(
            f"RainFusion needs all tokens of a head on one rank, but ring_degree is {outline.ring}, which splits them. "
            "Put these ranks on ulysses_degree."
        )
    operators.check_sparse()
    size = JobSize(outline.grid, outline.steps, len(outline.work.blocks))
    return RainFusion(spec.rainfusion, size, operators, tally)
