"""The FLOPs of a pass through a network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassSize:
    """The size of a pass. batch: the number of videos. tokens: of each video. on_rank: of these, the tokens on one
    rank.

    per_token: whether each token has its own timestep.
    """

    batch: int
    tokens: int
    on_rank: int
    text_tokens: int
    per_token: bool = False


@dataclass(frozen=True)
class Work:
    """FLOPs of a pass through the network on all ranks together; a multiply-add counts as two.

    products: q k^T and its product with v in one block's self-attention. attention: the whole self-attention, including
    projections. block: a whole block. rest: everything outside of blocks. blocks: the number of blocks.
    """

    products: float
    attention: float
    block: float
    rest: float
    blocks: int

    @property
    def whole(self) -> float:
        return self.blocks * self.block + self.rest
