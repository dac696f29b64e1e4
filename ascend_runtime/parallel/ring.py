"""Ring attention: keys and values travel, queries stay (Liu et al., arXiv 2310.01889)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import PlainOperators
from ..ops.precision import LOG_SUM_EXP
from .mesh import Member, start_all_gather


@dataclass(frozen=True)
class Ring(Member):
    """Attention over the tokens of all ranks of `group`, each of which holds an equal part, padded at the end.

    exchange: "rotate": keys and values go around, from neighbour to neighbour, while attention to the last ones runs;
        a rank holds its own, those that it attends to and those that arrive. "gather": they are gathered while
        attention to the rank's own runs, and one attention to all others follows: fewer, larger calls, and 2 R parts
        in memory at most, while the others are put in a row.
    """

    operators: PlainOperators
    exchange: str = "rotate"

    def attention(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """query [B, S', heads, head_dim] without padding, key and value [B, S/R, heads, head_dim] with it.

        lengths: tokens of each rank of the group, without padding.

        Sends, a rank: (R-1) times the bytes of its key and value.
        """
        merged = _Merged(query)
        travel = self._gather if self.exchange == "gather" else self._rotate
        travel(merged, query, [key, value], lengths)
        return merged.result()

    def _rotate(self, merged: _Merged, query: Tensor, key_value: list[Tensor], lengths: list[int]) -> None:
        for step in range(self.degree):
            travels = self._pass_on(key_value) if step + 1 < self.degree else None
            self._attend(merged, query, key_value, lengths[(self.rank - step) % self.degree])
            if travels:
                key_value = travels.arrived()

    def _gather(self, merged: _Merged, query: Tensor, key_value: list[Tensor], lengths: list[int]) -> None:
        gathering = [start_all_gather(x, self.group) for x in key_value]  # [R, B, S/R, heads, head_dim] each
        self._attend(merged, query, key_value, lengths[self.rank])
        others = [self._others(*gathering.pop(0), lengths) for _ in key_value]
        self._attend(merged, query, others, others[0].shape[1])

    def _others(self, gathered: Tensor, work: dist.Work, lengths: list[int]) -> Tensor:
        """What the other ranks hold, without padding, in a row [B, S - own, heads, head_dim]."""
        work.wait()
        parts = [gathered[rank, :, :length] for rank, length in enumerate(lengths) if rank != self.rank]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend(self, merged: _Merged, query: Tensor, key_value: list[Tensor], length: int) -> None:
        if length and query.shape[1]:
            key, value = (x[:, :length] for x in key_value)
            merged.add(*self.operators.attention_with_lse(query, key, value))

    def _pass_on(self, tensors: list[Tensor]) -> _Travel:
        """Sends them to the next rank of the ring, and receives the previous one's."""
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.degree)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.degree)
        sending = [dist.P2POp(dist.isend, x, after, self.group) for x in sent]
        receiving = [dist.P2POp(dist.irecv, x, before, self.group) for x in received]
        return _Travel(dist.batch_isend_irecv([*sending, *receiving]), received, sent)


@dataclass
class _Travel:
    """Tensors on their way; `sent` must live until they have arrived."""

    works: list[dist.Work]
    received: list[Tensor]
    sent: list[Tensor]

    def arrived(self) -> list[Tensor]:
        """What was received; nothing else is kept."""
        for work in self.works:
            work.wait()
        received, self.works, self.received, self.sent = self.received, [], [], []
        return received


class _Merged:
    """Attention to several parts as one: a sum weighted by each part's share of the exponentials."""

    def __init__(self, query: Tensor):
        self._like = query
        self._out: Tensor | None = None  # [B, S, heads, head_dim] in fp32
        self._lse: Tensor | None = None  # [B, S, heads]

    def add(self, out: Tensor, lse: Tensor) -> None:
        out = out.to(LOG_SUM_EXP.dtype)
        if self._out is None:
            self._out, self._lse = out, lse
            return
        weight = torch.sigmoid(lse - self._lse).unsqueeze(-1)  # exp(lse) / (exp(lse) + exp(the others'))
        self._out.lerp_(out, weight)
        self._lse = torch.logaddexp(self._lse, lse)

    def result(self) -> Tensor:
        return torch.zeros_like(self._like) if self._out is None else self._out.type_as(self._like)
