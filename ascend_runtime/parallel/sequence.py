"""Sequence parallelism: each rank holds a chunk of the tokens, and attention covers all of them.

Ulysses, ring attention, or both (USP: Fang and Zhao, arXiv 2405.07719): the ranks of a ring hold parts of the sequence,
and the ranks of a Ulysses group hold chunks of one part. Sequences and head counts that do not divide evenly are
padded; attention never includes the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Callable, Protocol

import torch.distributed as dist
from torch import Tensor

from ..ops import PlainOperators
from .mesh import Mesh, all_gather, pad_end
from .ring import Ring
from .ulysses import Ulysses

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key and value, each [B, S, heads, head_dim]


class SequenceLayout(Protocol):
    """How the tokens of a block stack are spread over ranks (see ShardedSequence for the methods)."""

    def split(self, x: Tensor, dim: int = 1) -> Tensor: ...

    def gather(self, x: Tensor, length: int) -> Tensor: ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend | None = None) -> Tensor: ...

    def own(self, length: int, behind: int = 0) -> int: ...

    def chunk_of(self, length: int) -> int: ...

    def place(self, length: int) -> slice: ...


@dataclass(frozen=True)
class WholeSequence:
    """All tokens on this rank. dense: the default attention."""

    dense: Attend

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        return x

    def gather(self, x: Tensor, length: int) -> Tensor:
        return x

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend | None = None) -> Tensor:
        return (attend or self.dense)(query, key, value)

    def own(self, length: int, behind: int = 0) -> int:
        return length

    def chunk_of(self, length: int) -> int:
        return length

    def place(self, length: int) -> slice:
        return slice(0, length)


class ShardedSequence:
    """Equal chunks of the tokens on the ranks of `group`, the last chunks padded with zeros.

    group: all ranks that share the sequence, with the ring's axis outermost.
    ulysses, ring: how attention is parallelised; at least one is given. dense: the default attention without a ring.
    """

    def __init__(self, group: dist.ProcessGroup, dense: Attend, ulysses: Ulysses | None, ring: Ring | None):
        self.group = group
        self.ulysses, self.ring = ulysses, ring
        self.degree, self.rank = self._seat(group)
        self.length = 0  # tokens of the whole sequence, without padding
        self._dense = dense

    def _seat(self, group: dist.ProcessGroup) -> tuple[int, int]:
        """(the number of ranks of a group, this rank's number in it)"""
        return dist.get_world_size(group), dist.get_rank(group)

    def chunk_of(self, length: int) -> int:
        """The tokens of a chunk, including padding, for a sequence of `length` tokens."""
        return -(-length // self.degree)

    def place(self, length: int) -> slice:
        """The tokens of a sequence of `length` tokens that are in this rank's chunk, without padding."""
        start = min(self.rank * self.chunk_of(length), length)
        return slice(start, start + self.own(length))

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's chunk of `x` along `dim`, the sequence dim."""
        self.length = x.shape[dim]
        own = self.place(self.length)
        return pad_end(x.narrow(dim, own.start, own.stop - own.start), dim, self.chunk_of(self.length))

    def gather(self, x: Tensor, length: int) -> Tensor:
        """All-gathers the sequence [B, length, D] from the chunks [B, S/N, D] of all ranks.

        Communication per rank: sends (N-1) times the bytes of its chunk.
        """
        chunks = self._all_gather(x)  # [N, B, S/N, D]
        return chunks.transpose(0, 1).flatten(1, 2)[:, :length]

    def _all_gather(self, x: Tensor) -> Tensor:
        """[N, *x.shape]"""
        return all_gather(x, self.group)

    def own(self, length: int, behind: int = 0) -> int:
        """The number of the first `length` tokens of a sequence that are in this rank's chunk, without padding. behind:
        the number of tokens that follow them, such as a text's after a video's; these are not counted."""
        chunk = self.chunk_of(length + behind)
        return min(max(length - self.rank * chunk, 0), chunk)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend | None = None) -> Tensor:
        """Attention over the whole sequence; all tensors are [B, S/N, heads, head_dim].

        attend: replaces the default attention, on whole sequences of some heads; ignored with a ring.
        """
        part = partial(self._attend, attend or self._dense)
        return part(query, key, value) if self.ulysses is None else self.ulysses.attention(part, query, key, value)

    def _attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention for this rank's part of the sequence [B, S/R, heads, head_dim], padded at its end."""
        tokens = query.shape[1]
        if self.ring is None:
            query, key, value = (x[:, : self.length] for x in (query, key, value))
            return pad_end(attend(query, key, value), 1, tokens)
        lengths = [min(max(self.length - rank * tokens, 0), tokens) for rank in range(self.ring.degree)]
        out = self.ring.attention(query[:, : lengths[self.ring.rank]], key, value, lengths)
        return pad_end(out, 1, tokens)


def spread(
    mesh: Mesh, operators: PlainOperators, ring_exchange: str = "rotate", overlap: bool = False
) -> SequenceLayout:
    """Spreads the tokens over the ranks of `mesh`. ring_exchange: see Ring. overlap: see Ulysses."""
    plan = mesh.plan
    if plan.ring * plan.ulysses == 1:
        return WholeSequence(operators.attention)
    ulysses = Ulysses(mesh.group("ulysses"), overlap) if plan.ulysses > 1 else None
    ring = Ring(mesh.group("ring"), operators, ring_exchange) if plan.ring > 1 else None
    return ShardedSequence(mesh.group("sequence"), operators.attention, ulysses, ring)
