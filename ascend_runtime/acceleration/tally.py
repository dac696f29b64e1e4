"""What a job left out, and what that saved: counted while it runs, told when it is done."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from statistics import median
from typing import NamedTuple

from ..models.cost import Work
from ..models.shared.block_stack import At


class Change(NamedTuple):
    """How much a step of the cond branch differs from the one before it, by the same expert.

    timestep, output: relative L1 changes of the timestep's projection and of the tokens after all blocks. ratio: of the
    norms of what the blocks add, the mean over all tokens.
    """

    expert: str
    step: int
    timestep: float
    output: float
    ratio: float


class Tally:
    """What each pass left out, on this rank."""

    def __init__(self, work: Work):
        self._work = work
        self._passes: dict[At, float] = {}  # FLOPs that were left out
        self._attentions: dict[int, int] = defaultdict(int)  # by step
        self._blocks: dict[int, int] = defaultdict(int)
        self._densities: list[float] = []
        self._changes: list[Change] = []
        self._seconds: list[float] = []
        self._clock = 0.0

    def began(self, at: At) -> None:
        self._passes[at] = 0.0

    def reused_attention(self, at: At, block: int) -> None:
        self._attentions[at.step] += 1
        self._passes[at] += self._work.blocks[block].attention

    def skipped_blocks(self, at: At, blocks: range) -> None:
        self._blocks[at.step] += len(blocks)
        self._passes[at] += sum(self._work.blocks[block].whole for block in blocks)

    def sparse_attention(self, at: At, block: int, density: float) -> None:
        """density: share of the products that one block's self-attention computed; a tensor of one number serves, so
        that nothing waits for a device before `facts`."""
        self._densities.append(density)
        self._passes[at] += (1 - density) * self._work.blocks[block].products

    def changed(self, change: Change) -> None:
        self._changes.append(change)

    def start(self) -> None:
        """The first step begins."""
        self._clock = time.perf_counter()

    def stepped(self) -> None:
        """A step is done; its result is on the CPU, so what it computed is."""
        now = time.perf_counter()
        self._seconds.append(now - self._clock)
        self._clock = now

    def facts(self) -> dict[str, object]:
        """By name: steps that reused attention or left out blocks (from 0), how many of these there were, the mean
        density of sparse attention, FLOPs saved as a share, seconds a step, and the loop's speed-up: as the FLOPs
        predict it, and as the steps that left nothing out show it (None where there was none). Where changes were
        measured, these."""
        saved, whole = float(sum(self._passes.values())), self._work.whole * len(self._passes)
        facts = {
            "steps_reusing": sorted({*self._attentions, *self._blocks}),
            "attentions_reused": sum(self._attentions.values()),
            "blocks_skipped": sum(self._blocks.values()),
            "mean_density": float(sum(self._densities)) / len(self._densities) if self._densities else 1.0,
            "flops_saved": saved / whole,
            "seconds_a_step": [round(seconds, 4) for seconds in self._seconds],
            "predicted_speed_up": whole / (whole - saved),
            "seen_speed_up": self._seen_speed_up(),
        }
        return facts | ({"changes": [change._asdict() for change in self._changes]} if self._changes else {})

    def _seen_speed_up(self) -> float | None:
        """By the median pass of the steps that left nothing out: experts may have one pass a step, or two."""
        passes = Counter(at.step for at in self._passes)
        thinned = {at.step for at, saved in self._passes.items() if saved}
        whole = [seconds / passes[step] for step, seconds in enumerate(self._seconds) if step not in thinned]
        return median(whole) * len(self._passes) / sum(self._seconds) if whole else None
