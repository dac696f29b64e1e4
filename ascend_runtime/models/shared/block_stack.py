"""A pass through a block stack: decides which blocks and attentions are computed; by default, all are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Callable, NamedTuple

from torch import Tensor

from ...parallel.sequence import Attend

RunBlock = Callable[[int, Tensor], Tensor]  # (a block's number, its input tokens [B, S, D]) -> its output tokens


class At(NamedTuple):
    """Identifies a pass; the key for anything that one pass caches for a later one."""

    expert: str
    branch: str  # of guidance: cond or uncond
    step: int  # of the job, from 0


class BlockStack(NamedTuple):
    """The blocks of a network. run: computes one. count: their number, in one numbering whatever their kinds.

    indicator: (the tokens [B, S, D] before the first block, the number of tokens without padding) -> the tensor that
    TeaCache compares from step to step: one whose change predicts the change of the blocks' output.
    """

    run: RunBlock
    count: int
    indicator: Callable[[Tensor, int], Tensor]

    def through(self, tokens: Tensor, blocks: range) -> Tensor:
        """The tokens [B, S, D] after these blocks, run one after the other."""
        for block in blocks:
            tokens = self.run(block, tokens)
        return tokens


class Pass:
    """A pass that computes everything."""

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        return stack.through(tokens, range(stack.count))

    def attention(self, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        """A block's self-attention [B, S, D], projections included.

        compute: computes it; its argument replaces the operators' attention over the whole sequence, None keeps it.
        """
        return compute(None)


EVERYTHING = Pass()


class Skipping(Pass):
    """A pass that leaves out some blocks: their output is their input. passing: decides about the others."""

    def __init__(self, passing: Pass, skipped: Collection[int]):
        self._passing, self._skipped = passing, frozenset(skipped)

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        def run(number: int, tokens: Tensor) -> Tensor:
            return tokens if number in self._skipped else stack.run(number, tokens)

        return self._passing.blocks(stack._replace(run=run), tokens)

    def attention(self, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        return self._passing.attention(block, compute)
