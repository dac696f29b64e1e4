"""What a pass through a network computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassSize:
    """The size of a pass: `batch` videos of `tokens` tokens each, `on_rank` of them on a rank, next to `text_tokens`.

    per_token: whether each token has a timestep of its own.
    """

    batch: int
    tokens: int
    on_rank: int
    text_tokens: int
    per_token: bool = False


@dataclass(frozen=True)
class Work:
    """FLOPs of a pass through the network (a product and a sum are two), of all ranks together.

    products: of a block's self-attention, q k^T and its product with v. attention: of that with its projections.
    block: of a whole block. rest: of what is in no block. blocks: how many there are.
    """

    products: float
    attention: float
    block: float
    rest: float
    blocks: int

    @property
    def whole(self) -> float:
        return self.blocks * self.block + self.rest
