"""What a pass through a network computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassSize:
    """The size of a pass: `batch` videos of `tokens` tokens each, next to `text_tokens`.

    on_rank: tokens of the blocks' sequence on a rank, those of a text included where they stand in it.

    per_token: whether each token has a timestep of its own.
    """

    batch: int
    tokens: int
    on_rank: int
    text_tokens: int
    per_token: bool = False


@dataclass(frozen=True)
class BlockWork:
    """FLOPs of a block (a product and a sum are two), of all ranks together.

    products: of its self-attention, q k^T and its product with v. attention: of that with its projections. whole: of
    all of it.
    """

    products: float
    attention: float
    whole: float


@dataclass(frozen=True)
class Work:
    """FLOPs of a pass through the network. blocks: of each, in the order in which they compute, whatever their kinds.
    rest: of what is in no block."""

    blocks: tuple[BlockWork, ...]
    rest: float

    @property
    def whole(self) -> float:
        return sum(block.whole for block in self.blocks) + self.rest
