"""Ring attention: ranks pass keys and values on, and keep their queries (Liu et al., arXiv 2310.01889)."""

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
    """Attention over the tokens of all ranks of `group`, each of which holds an equal chunk, padded at the end.

    exchange: "rotate": each rank sends keys and values to the next one while it attends to those received before; it
        holds its own, the current and the arriving ones. "gather": an all-gather runs while a rank attends to its own
        keys, then one attention to all others follows: fewer, larger calls, but up to 2 R chunks in memory while they
        are concatenated.
    """

    operators: PlainOperators
    exchange: str = "rotate"

    def attention(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """query [B, S', heads, head_dim] without padding, key and value [B, S/R, heads, head_dim] with it.

        lengths: tokens of each rank of the group, without padding.

        Communication per rank: sends (R-1) times the bytes of its key and value.
        """
        merged = _Merged(query)
        run = self._gather if self.exchange == "gather" else self._rotate
        run(merged, query, [key, value], lengths)
        return merged.result()

    def _rotate(self, merged: _Merged, query: Tensor, key_value: list[Tensor], lengths: list[int]) -> None:
        for step in range(self.degree):
            exchange = self._pass_on(key_value) if step + 1 < self.degree else None
            self._attend(merged, query, key_value, lengths[(self.rank - step) % self.degree])
            if exchange:
                key_value = exchange.arrived()

    def _gather(self, merged: _Merged, query: Tensor, key_value: list[Tensor], lengths: list[int]) -> None:
        gathering = [self._start_gather(x) for x in key_value]  # [R, B, S/R, heads, head_dim] each
        self._attend(merged, query, key_value, lengths[self.rank])
        others = [self._others(*gathering.pop(0), lengths) for _ in key_value]
        self._attend(merged, query, others, others[0].shape[1])

    def _start_gather(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        return start_all_gather(x, self.group)

    def _others(self, gathered: Tensor, work: dist.Work, lengths: list[int]) -> Tensor:
        """The other ranks' tokens without padding, concatenated: [B, S - own, heads, head_dim]."""
        work.wait()
        parts = [gathered[rank, :, :length] for rank, length in enumerate(lengths) if rank != self.rank]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend(self, merged: _Merged, query: Tensor, key_value: list[Tensor], length: int) -> None:
        if length and query.shape[1]:
            key, value = (x[:, :length] for x in key_value)
            merged.add(*self.operators.attention_with_lse(query, key, value))

    def _pass_on(self, tensors: list[Tensor]) -> _Exchange:
        """Starts to send these tensors to the next rank of the ring, and to receive those of the previous one."""
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.degree)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.degree)
        sending = [dist.P2POp(dist.isend, x, after, self.group) for x in sent]
        receiving = [dist.P2POp(dist.irecv, x, before, self.group) for x in received]
        return _Exchange(dist.batch_isend_irecv([*sending, *receiving]), received, sent)


@dataclass
class _Exchange:
    """An exchange in progress; `sent` must stay alive until it is complete."""

    works: list[dist.Work]
    received: list[Tensor]
    sent: list[Tensor]

    def arrived(self) -> list[Tensor]:
        """Waits, and returns the received tensors without keeping references."""
        for work in self.works:
            work.wait()
        received, self.works, self.received, self.sent = self.received, [], [], []
        return received


class _Merged:
    """Merges attention to several chunks: an average weighted by each chunk's sum of exponentials."""

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
