"""One pass through a block stack: what of it is computed. A stack asks; by default it computes all."""

from __future__ import annotations

from typing import Callable, NamedTuple

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value [B, S, heads, head_dim] -> as query
RunBlock = Callable[[int, Tensor], Tensor]  # a block's number, its tokens [B, S, D] -> the next block's


class At(NamedTuple):
    """Which pass it is: the key of whatever is kept from one pass for a later one."""

    expert: str
    branch: str  # of guidance: cond or uncond
    step: int  # of the job, from 0


class BlockStack(NamedTuple):
    """What a pass is asked about. run: computes a block. count: of blocks, in one numbering whatever their kinds.

    indicator: what TeaCache compares from step to step, made of the tokens [B, S, D] before the first block and the
    number of those that are no padding: any tensor whose change predicts that of the blocks' output.
    """

    run: RunBlock
    count: int
    indicator: Callable[[Tensor, int], Tensor]

    def through(self, tokens: Tensor, blocks: range) -> Tensor:
        """The tokens [B, S, D] after some blocks, one after the other."""
        for block in blocks:
            tokens = self.run(block, tokens)
        return tokens


class Pass:
    """A pass that computes all."""

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        return stack.through(tokens, range(stack.count))

    def attention(self, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        """A block's self-attention [B, S, D], projections included.

        compute: makes it, with an attention over the whole sequence that replaces the operators' own, or with these.
        """
        return compute(None)


EVERYTHING = Pass()
