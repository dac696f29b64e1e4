"""The accelerators of one job on this rank: what its description asks for, checked, and asked at every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from torch import Tensor

from ..acceleration import AccelerationSpec, AttentionCacheSpec, Window
from .attention_cache import AttentionCache
from .block_cache import BlockCache
from .passes import EVERYTHING, At, Attend, Pass, Stack
from .report import Tally, Work


@dataclass(frozen=True)
class Outline:
    """A job as its accelerators see it.

    grid: tokens of a video, as frames, rows and columns. branches: of guidance, that this rank computes.
    output: bytes of one block's output [B, S, D] on this rank. room: bytes that it has to keep things in.
    ring: ranks of the ring, 1 where there is none.
    """

    steps: int
    grid: tuple[int, int, int]
    branches: int
    output: int
    room: int
    ring: int
    work: Work


class Acceleration:
    """Raises ValueError, before anything is computed, for what this job cannot have."""

    def __init__(self, spec: AccelerationSpec, outline: Outline):
        self.spec = spec
        self.tally = Tally(outline.work)
        self._outline = outline
        self._make_caches = lambda: _caches(spec, outline, self.tally)
        self._attention, self._stack = self._make_caches()
        self._expert: str | None = None

    def passing(self, at: At) -> Pass:
        """The pass that is about to begin. An expert begins with nothing kept: the one before it does not come back."""
        if self._expert not in (None, at.expert):
            self._attention, self._stack = self._make_caches()
        self._expert = at.expert
        self.tally.began(at)
        return EVERYTHING if self.spec == AccelerationSpec() else _Pass(at, self._attention, self._stack)

    def facts(self) -> dict[str, object]:
        """What it left out so far; nothing where nothing was asked for."""
        return {} if self.spec == AccelerationSpec() else {"acceleration": self.tally.facts()}


class _Pass(Pass):
    def __init__(self, at: At, attention: AttentionCache | None, stack: BlockCache | None):
        self._at, self._attention, self._stack = at, attention, stack

    def blocks(self, stack: Stack, tokens: Tensor) -> Tensor:
        return super().blocks(stack, tokens) if self._stack is None else self._stack.blocks(self._at, stack, tokens)

    def attention(self, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        attend = None
        if self._attention is None:
            return compute(attend)
        return self._attention.attention(self._at, block, lambda: compute(attend))


def _caches(
    spec: AccelerationSpec, outline: Outline, tally: Tally
) -> tuple[AttentionCache | None, BlockCache | None]:
    """What is asked at each attention, and what at each pass."""
    steps, blocks = outline.steps, outline.work.blocks
    if spec.attention_cache is not None:
        return AttentionCache(_window(spec.attention_cache, outline), steps, blocks, tally), None
    if spec.block_cache is not None:
        return None, BlockCache(spec.block_cache, steps, blocks, tally)
    return None, None


def _window(spec: AttentionCacheSpec, outline: Outline) -> Window:
    """Where attention is stored and reused. Raises ValueError where what is stored does not fit."""
    work, blocks = outline.work, len(spec.blocks(outline.work.blocks))
    window = spec.windowed(outline.steps, share=blocks * work.attention / work.whole)
    needed = blocks * outline.output * outline.branches
    if window.reused(outline.steps) and needed > outline.room:
        fitting = outline.room // (outline.output * outline.branches)
        raise ValueError(
            f"AttentionCache would keep {needed / 1e9:.1f} GB on a rank, the outputs of {blocks} blocks for "
            f"{outline.branches} branch(es) of guidance, and {outline.room / 1e9:.1f} GB are free. Spread the video "
            "over more ranks (ulysses_degree, or cfg_degree 2), make it smaller, take the block cache or a step "
            "cache, which keep little"
            + (f", or let last_block be first_block + {fitting - 1} at most." if fitting else ".")
        )
    return window
