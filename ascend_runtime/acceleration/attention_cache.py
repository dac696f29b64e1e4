"""AttentionCache: reuses the output of a block's self-attention from an earlier step.

The schedule is MindIE SD's (see `specs.Window`). Cached outputs have the key (expert, branch, block), and the job gives
the number of the step, so guidance in series, a second expert or a warm-up does not shift the schedule.
"""

from __future__ import annotations

from typing import Callable

from torch import Tensor

from ..models.shared.block_stack import At
from ..specs import Window
from .tally import Tally


class AttentionCache:
    """blocks: the number of blocks of the network. If nothing is cached yet, a step that should reuse computes."""

    def __init__(self, window: Window, steps: int, blocks: int, tally: Tally):
        self._window, self._steps = window, steps
        self._blocks = window.blocks(blocks)
        self._tally = tally
        self._kept: dict[tuple[str, str, int], Tensor] = {}

    def attention(self, at: At, block: int, compute: Callable[[], Tensor]) -> Tensor:
        """The output [B, S, D] of the attention, computed or cached."""
        key = (at.expert, at.branch, block)
        if block not in self._blocks:
            return compute()
        keeps = self._window.stores(at.step, self._steps)
        if self._window.reuses(at.step, self._steps) and key in self._kept:
            self._tally.reused_attention(at, block)
            return self._kept[key] if keeps else self._kept.pop(key)
        self._kept.pop(key, None)  # before computing, so that only one output of a block is in memory
        out = compute()
        if keeps:
            self._kept[key] = out
        return out
