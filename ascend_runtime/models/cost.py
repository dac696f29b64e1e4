"""The FLOPs of a pass through a network, and what tensor parallelism exchanges in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassSize:
    """The size of a pass.

    batch: the number of videos. tokens: of each video. on_rank: the tokens of the blocks' sequence on one rank,
    including a text's if it is part of that sequence. text_tokens: of the text.
    per_token: whether each token has its own timestep.
    """

    batch: int
    tokens: int
    on_rank: int
    text_tokens: int
    per_token: bool = False


@dataclass(frozen=True)
class BlockWork:
    """FLOPs of a block on all ranks together; a multiply-add counts as two.

    products: q k^T and its product with v in the self-attention. attention: the whole self-attention, including
    projections. whole: the whole block.
    """

    products: float
    attention: float
    whole: float


@dataclass(frozen=True)
class Work:
    """FLOPs of a pass through the network. blocks: of each, in the order in which they compute, whatever their kinds.
    rest: of everything outside of blocks."""

    blocks: tuple[BlockWork, ...]
    rest: float

    @property
    def whole(self) -> float:
        return sum(block.whole for block in self.blocks) + self.rest


@dataclass(frozen=True)
class SlicedSums:
    """What ranks of tensor parallelism exchange in a pass.

    reduced: bytes of a rank's tensors that are all-reduced. gathered: bytes of whole outputs, of each of which a rank
    computes its slice and gathers the others. reductions, gathers: the number of such exchanges.
    """

    reduced: int
    reductions: int
    gathered: int = 0
    gathers: int = 0
