"""DiTBlockCache: reuses the residual that a range of blocks added to the tokens in an earlier step.

It follows MindIE SD's DiTBlockCache, with the schedule of `specs.Window`. Unlike MindIE SD, it stops at the end step.
"""

from __future__ import annotations

from torch import Tensor

from ..models.shared.block_stack import At, BlockStack
from ..specs import Window
from .tally import Tally


class BlockCache:
    """blocks: the number of blocks of the network."""

    def __init__(self, window: Window, steps: int, blocks: int, tally: Tally):
        self._window, self._steps = window, steps
        self._blocks = window.blocks(blocks)
        self._tally = tally
        self._kept: dict[tuple[str, str], Tensor] = {}

    def blocks(self, at: At, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        tokens = stack.through(tokens, range(self._blocks.start))
        tokens = self._range(at, stack, tokens)
        return stack.through(tokens, range(self._blocks.stop, stack.count))

    def _range(self, at: At, stack: BlockStack, tokens: Tensor) -> Tensor:
        key = (at.expert, at.branch)
        keeps = self._window.stores(at.step, self._steps)
        if self._window.reuses(at.step, self._steps) and key in self._kept:
            self._tally.skipped_blocks(at, self._blocks)
            return tokens + (self._kept[key] if keeps else self._kept.pop(key))
        self._kept.pop(key, None)
        out = stack.through(tokens, self._blocks)
        if keeps:
            self._kept[key] = out - tokens
        return out
