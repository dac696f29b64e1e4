"""Ulysses: exchanges chunks of the sequence for groups of heads and back (Jacobs et al., arXiv 2309.14509).

If the degree does not divide the number of heads, they are padded with zero heads, which are dropped afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Member, pad_end

OVERLAP_PARTS = 2  # groups of heads in an overlapped exchange: only the first group's exchange is exposed


@dataclass(frozen=True)
class Ulysses(Member):
    """The all-to-all exchanges around attention over `group`.

    overlap: exchanges one group of heads while attention to another runs.
    """

    overlap: bool = False

    def attention(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Attention of chunks [B, S/U, heads, head_dim]; the result has query's shape.

        attend: maps query, key and value [B, S, some heads, head_dim] to [B, S, these heads, head_dim].

        Communication per rank: sends 4 (U-1)/U times its chunk's bytes (heads padded to a multiple of U), three
        quarters of it before the attention and one quarter after it.
        """
        heads = query.shape[2]
        padded = -(-heads // self.degree) * self.degree
        # [B, S/U, U, heads/U, D] each
        qkv = [pad_end(x, 2, padded).unflatten(2, (self.degree, -1)) for x in (query, key, value)]
        count = min(OVERLAP_PARTS if self.overlap else 1, padded // self.degree)
        parts = list(zip(*(x.tensor_split(count, dim=3) for x in qkv)))
        arriving, leaving = self._send_heads(parts[0]), []
        for part in range(len(parts)):
            whole = [_received(x).transpose(0, 1).flatten(1, 2) for x in arriving]  # [B, S, heads of this part, D]
            if part + 1 < len(parts):
                arriving = self._send_heads(parts[part + 1])
            leaving.append(self._send_chunks(attend(*whole)))
        outs = [_received(sent).permute(1, 2, 0, 3, 4) for sent in leaving]  # [B, S/U, U, heads of a part, D]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)
        return out.flatten(2, 3)[:, :, :heads]

    def _send_heads(self, part: tuple[Tensor, Tensor, Tensor]) -> list[_Exchange]:
        """[B, S/U, U, heads, D] -> [U (chunks), B, S/U, heads, D] for each tensor. With B = 1, the chunks form the
        sequence without a copy."""
        return [self._all_to_all(x.movedim(2, 0)) for x in part]

    def _send_chunks(self, x: Tensor) -> _Exchange:
        """[B, S, heads, D] -> [U (groups of heads), B, S/U, heads, D]"""
        return self._all_to_all(x.unflatten(1, (self.degree, -1)).movedim(1, 0))

    def _all_to_all(self, x: Tensor) -> _Exchange:
        sent = x.contiguous()
        received = torch.empty_like(sent)
        return dist.all_to_all_single(received, sent, group=self.group, async_op=True), received, sent


_Exchange = tuple[dist.Work, Tensor, Tensor]  # work, received, sent; `sent` must stay alive until the work is done


def _received(exchange: _Exchange) -> Tensor:
    work, received, _ = exchange
    work.wait()
    return received
