"""Counts what accelerators skip while a job runs, and reports what that saved."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from statistics import median
from typing import NamedTuple

from ..models.cost import Work
from ..models.shared.block_stack import At


class Change(NamedTuple):
    """The difference between a step of the cond branch and the step before it, of the same expert.

    timestep, output: relative L1 changes of TeaCache's indicator (`BlockStack`), and of the tokens after all blocks.
    ratio: of the norms of the blocks' residual, averaged over all tokens.
    """

    expert: str
    step: int
    timestep: float
    output: float
    ratio: float


class Tally:
    """The FLOPs that each pass skipped on this rank, and the seconds of each step."""

    def __init__(self, work: Work):
        self._work = work
        self._passes: dict[At, float] = {}  # skipped FLOPs
        self._attentions: dict[int, int] = defaultdict(int)  # by step
        self._blocks: dict[int, int] = defaultdict(int)
        self._densities: list[float] = []
        self._changes: list[Change] = []
        self._seconds: dict[int, float] = {}  # by step
        self._clock = 0.0
        self._first = 0

    def began(self, at: At) -> None:
        self._passes[at] = 0.0

    def reused_attention(self, at: At, block: int) -> None:
        self._attentions[at.step] += 1
        self._passes[at] += self._work.blocks[block].attention

    def skipped_blocks(self, at: At, blocks: range) -> None:
        self._blocks[at.step] += len(blocks)
        self._passes[at] += sum(self._work.blocks[block].whole for block in blocks)

    def sparse_attention(self, at: At, block: int, density: float) -> None:
        """density: the fraction of one block's attention matrix that was computed. It may be a tensor with one element;
        it is read only in `facts`, so nothing waits for the device before."""
        self._densities.append(density)
        self._passes[at] += (1 - density) * self._work.blocks[block].products

    def changed(self, change: Change) -> None:
        self._changes.append(change)

    def start(self, step: int = 0) -> None:
        """Starts the clock; called before the first step that is computed, of this number."""
        self._clock, self._first = time.perf_counter(), step

    def stepped(self) -> None:
        """Records a step's seconds. Its result is on the CPU, so the device has finished it."""
        now = time.perf_counter()
        self.took(self._first + len(self._seconds), now - self._clock)
        self._clock = now

    def took(self, step: int, seconds: float) -> None:
        """Adds to a step's seconds, which several calls may share."""
        self._seconds[step] = self._seconds.get(step, 0.0) + seconds

    def facts(self) -> dict[str, object]:
        """The report: steps that reused attention or blocks (counted from 0), the numbers of reused attentions and
        skipped blocks, the mean density of sparse attention, the fraction of FLOPs saved, seconds of each step, and the
        speed-up of the loop: predicted from the FLOPs, and measured against full steps (None without a full step).
        Measured changes are added if there are any."""
        saved, whole = float(sum(self._passes.values())), self._work.whole * len(self._passes)
        facts = {
            "steps_reusing": sorted({*self._attentions, *self._blocks}),
            "attentions_reused": sum(self._attentions.values()),
            "blocks_skipped": sum(self._blocks.values()),
            "mean_density": float(sum(self._densities)) / len(self._densities) if self._densities else 1.0,
            "flops_saved": saved / whole,
            "seconds_a_step": [round(seconds, 4) for seconds in self._seconds.values()],
            "predicted_speed_up": whole / (whole - saved),
            "seen_speed_up": self._measured_speed_up(),
        }
        return facts | ({"changes": [change._asdict() for change in self._changes]} if self._changes else {})

    def _measured_speed_up(self) -> float | None:
        """Uses the median time of a pass in full steps, as one expert may take one pass per step and another two."""
        passes = Counter(at.step for at in self._passes)
        reduced = {at.step for at, saved in self._passes.items() if saved}
        full = [seconds / passes[step] for step, seconds in self._seconds.items() if step not in reduced]
        return median(full) * len(self._passes) / sum(self._seconds.values()) if full else None
