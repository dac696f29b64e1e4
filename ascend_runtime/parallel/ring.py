"""Ring attention: keys and values travel, queries stay (Liu et al., arXiv 2310.01889)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import PlainOperators
from ..precision import LOG_SUM_EXP
from .mesh import Member, start_all_gather


@dataclass(frozen=True)
class Ring(Member):
    """Attention over the tokens of all ranks of `group`, each of which holds an equal part, padded at the end.

    exchange: "rotate": keys and values go around, from neighbour to neighbour, while attention to the last ones runs;
        a rank holds two parts at a time. "gather": they are gathered while attention to the rank's own runs, and one
        attention to all others follows: fewer, larger calls, and all parts in memory.
    """

    operators: PlainOperators
    exchange: str = "rotate"

    def attention(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """query [B, S', heads, head_dim] without padding, key and value [B, S/R, heads, head_dim] with it.

        lengths: tokens of each rank of the group, without padding.

        Sends, a rank: (R-1) times the bytes of its key and value.
        """
        merged, key_value = _Merged(query), torch.stack((key, value))
        travel = self._gather if self.exchange == "gather" else self._rotate
        travel(merged, query, key_value, lengths)
        return merged.result()

    def _rotate(self, merged: _Merged, query: Tensor, key_value: Tensor, lengths: list[int]) -> None:
        for step in range(self.degree):
            travels = self._pass_on(key_value) if step + 1 < self.degree else None
            self._attend(merged, query, key_value, lengths[(self.rank - step) % self.degree])
            if travels is not None:
                works, key_value, _ = travels
                for work in works:
                    work.wait()

    def _gather(self, merged: _Merged, query: Tensor, key_value: Tensor, lengths: list[int]) -> None:
        gathered, work = start_all_gather(key_value, self.group)  # [R, 2, B, S/R, heads, head_dim]
        self._attend(merged, query, key_value, lengths[self.rank])
        work.wait()
        others = torch.cat([gathered[rank, :, :, :n] for rank, n in enumerate(lengths) if rank != self.rank], dim=2)
        self._attend(merged, query, others, others.shape[2])

    def _attend(self, merged: _Merged, query: Tensor, key_value: Tensor, length: int) -> None:
        if length and query.shape[1]:
            key, value = key_value[:, :, :length].unbind()
            merged.add(*self.operators.attention_with_lse(query, key, value))

    def _pass_on(self, x: Tensor) -> tuple[list[dist.Work], Tensor, Tensor]:
        """Sends x to the next rank of the ring and receives the previous one's; the third must live until then."""
        sent, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.degree)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.degree)
        sending = dist.P2POp(dist.isend, sent, after, self.group)
        receiving = dist.P2POp(dist.irecv, received, before, self.group)
        return dist.batch_isend_irecv([sending, receiving]), received, sent


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
        self._out = torch.lerp(self._out, out, weight)
        self._lse = torch.logaddexp(self._lse, lse)

    def result(self) -> Tensor:
        return torch.zeros_like(self._like) if self._out is None else self._out.type_as(self._like)
