"""AttentionCache: a block's self-attention of an earlier step stands for this one's.

The schedule is MindIE SD's (see `acceleration.Window`). What is kept has the key (expert, branch, block), with the step
given by the job, so neither guidance in series nor a second expert nor a warm-up shifts it.
"""

from __future__ import annotations

from typing import Callable

from torch import Tensor

from ..models.shared.block_stack import At
from ..specs import Window
from .tally import Tally


class AttentionCache:
    """blocks: of the network. An expert that has stored nothing yet computes, in a step that reuses too."""

    def __init__(self, window: Window, steps: int, blocks: int, tally: Tally):
        self._window, self._steps = window, steps
        self._blocks = window.blocks(blocks)
        self._tally = tally
        self._kept: dict[tuple[str, str, int], Tensor] = {}

    def attention(self, at: At, block: int, compute: Callable[[], Tensor]) -> Tensor:
        """[B, S, D], of this step or of the last that stored."""
        key = (at.expert, at.branch, block)
        if block not in self._blocks:
            return compute()
        keeps = self._window.stores(at.step, self._steps)
        if self._window.reuses(at.step, self._steps) and key in self._kept:
            self._tally.reused_attention(at, block)
            return self._kept[key] if keeps else self._kept.pop(key)
        self._kept.pop(key, None)  # first, so that never two of a block are held
        out = compute()
        if keeps:
            self._kept[key] = out
        return out
