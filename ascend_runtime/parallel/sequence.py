"""One sequence over several ranks: each holds a chunk of the tokens, and attention sees them all.

Ulysses (Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509): before attention an all-to-all turns chunks of the
sequence into groups of heads, after it another turns them back. Sequences and head counts that do not divide by
the degree are padded; the padding never enters a softmax.
"""

from __future__ import annotations

from typing import Callable, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .mesh import all_gather


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key and value, each [B, S, heads, head_dim]


class Sequence(Protocol):
    """What a block stack needs to know of how its sequence is spread."""

    def split(self, x: Tensor, dim: int = 1) -> Tensor: ...

    def gather(self, x: Tensor, length: int) -> Tensor: ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class WholeSequence:
    """All tokens on this rank."""

    def __init__(self, attention: Attention):
        self.attention = attention

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        return x

    def gather(self, x: Tensor, length: int) -> Tensor:
        return x


class Ulysses:
    """Tokens in equal chunks over the ranks of `group`, the last chunk padded with zeros.

    attention: what each rank computes, on whole sequences of some heads.
    """

    def __init__(self, group: dist.ProcessGroup, attention: Attention):
        self.group = group
        self._attend = attention
        self.degree = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.length = 0  # tokens of the whole sequence, without padding

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's chunk of `x` along `dim`, the sequence."""
        self.length = x.shape[dim]
        chunk = -(-self.length // self.degree)
        start = min(self.rank * chunk, self.length)
        own = x.narrow(dim, start, min(chunk, self.length - start))
        return _pad_end(own, dim, chunk)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """The whole sequence [B, length, D] from the chunks [B, S/U, D] of all ranks."""
        chunks = all_gather(x, self.group)  # [U, B, S/U, D]
        return chunks.transpose(0, 1).flatten(1, 2)[:, :length]

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention over the whole sequence; all tensors are [B, S/U, heads, head_dim].

        Sends, a rank: 4 (U-1)/U of its chunk's bytes, three parts before and one after the attention.
        """
        heads = query.shape[2]
        packed = torch.stack((query, key, value))  # [3, B, S/U, heads, D]
        packed = _pad_end(packed, 3, -(-heads // self.degree) * self.degree)
        query, key, value = self._to_heads(packed).unbind()
        out = self._attend(query, key, value)
        out = _pad_end(out, 1, -(-self.length // self.degree) * self.degree)
        return self._to_chunks(out)[:, :, :heads]

    def _to_heads(self, x: Tensor) -> Tensor:
        """[3, B, S/U, heads, D] of one chunk -> [3, B, S, heads/U, D] of all chunks, padding cut off."""
        x = x.unflatten(3, (self.degree, -1)).movedim(3, 0)  # [U(heads), 3, B, S/U, heads/U, D]
        x = self._all_to_all(x)  # [U(chunks), 3, B, S/U, heads/U, D]
        return x.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, : self.length]

    def _to_chunks(self, x: Tensor) -> Tensor:
        """[B, S, heads/U, D] of all chunks -> [B, S/U, heads, D] of one chunk."""
        x = x.unflatten(1, (self.degree, -1)).movedim(1, 0)  # [U(chunks), B, S/U, heads/U, D]
        x = self._all_to_all(x)  # [U(heads), B, S/U, heads/U, D]
        return x.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _all_to_all(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received


def _pad_end(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with zeros after its end along `dim`, up to `size`."""
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
