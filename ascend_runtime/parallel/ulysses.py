"""Ulysses: chunks of the sequence become groups of heads and back (Jacobs et al., arXiv 2309.14509).

Head counts that do not divide by the degree are padded with heads of zeros, which are thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Member, pad_end

PARTS = 2  # in which an overlapped exchange travels: the first part's is the only one that nothing hides


@dataclass(frozen=True)
class Ulysses(Member):
    """The all-to-all around an attention over `group`.

    overlap: heads travel in parts, one while the attention of another runs.
    """

    overlap: bool = False

    def attention(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Attention of chunks [B, S/U, heads, head_dim]; the result is as query.

        attend: of query, key and value [B, S, some heads, head_dim] -> [B, S, these heads, head_dim].

        Sends, a rank: 4 (U-1)/U of its chunk's bytes (heads padded to a multiple of U), three parts of four before
        the attention and one after it.
        """
        heads = query.shape[2]
        padded = -(-heads // self.degree) * self.degree
        # [B, S/U, U, heads/U, D] each
        qkv = [pad_end(x, 2, padded).unflatten(2, (self.degree, -1)) for x in (query, key, value)]
        count = min(PARTS if self.overlap else 1, padded // self.degree)
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
        """[B, S/U, U, heads, D] -> [U(chunks), B, S/U, heads, D], each: with one video the chunks need no copy to be
        the sequence."""
        return [self._all_to_all(x.movedim(2, 0)) for x in part]

    def _send_chunks(self, x: Tensor) -> _Exchange:
        """[B, S, heads, D] -> [U(groups of heads), B, S/U, heads, D]"""
        return self._all_to_all(x.unflatten(1, (self.degree, -1)).movedim(1, 0))

    def _all_to_all(self, x: Tensor) -> _Exchange:
        sent = x.contiguous()
        received = torch.empty_like(sent)
        return dist.all_to_all_single(received, sent, group=self.group, async_op=True), received, sent


_Exchange = tuple[dist.Work, Tensor, Tensor]  # what was sent must live until the work is done


def _received(exchange: _Exchange) -> Tensor:
    work, received, _ = exchange
    work.wait()
    return received
