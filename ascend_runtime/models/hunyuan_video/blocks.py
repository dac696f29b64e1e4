"""The blocks of the HunyuanVideo transformer: double ones, then single ones.

One tensor of tokens [video | text] goes through all blocks. A double block has weights of its own for video and text,
a single block one set for all tokens. A rank's chunk begins with its `Tokens.video` tokens of the video; the rest is
text, and padding that no attention reads. Parameters have diffusers' names, except for a single block's `proj_out`,
which is two matrices here: what reads the attention, and what reads the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ...ops.plain import PlainOperators, RotaryTable
from ...ops.precision import MODULATION
from ...parallel.tensor import TensorParallel, WholeWeights
from ..shared.block_stack import Attend

EPS = 1e-6
SelfAttention = Callable[[Callable[[Attend | None], Tensor]], Tensor]  # see block_stack.Pass.attention
Span = tuple[slice, tuple[Tensor, ...]]  # tokens of a stream, and their shifts, scales and gates


class Chunk(NamedTuple):
    """A rank's chunk of tokens. video: the number of the video's, which come first. clean: how many of these belong to
    a first frame that is known and clean, and is modulated by a vector of its own."""

    video: int
    clean: int = 0


class Vectors(NamedTuple):
    """What modulates tokens, each [B, D], after its SiLU. noisy: those of the video and the text; clean: a clean first
    frame's."""

    noisy: Tensor
    clean: Tensor | None = None


class Modulation(nn.Module):
    """Shifts, scales and gates, linear in a vector."""

    def __init__(self, dim: int, number: int):
        super().__init__()
        self.linear = nn.Linear(dim, number * dim)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, 1, D] in fp32, of a vector [B, D]."""
        made = self.linear(vector).to(MODULATION.dtype)
        return made.unsqueeze(1).unflatten(-1, (-1, vector.shape[1])).unbind(2)

    def spans(self, tokens: int, vectors: Vectors, clean: int = 0) -> list[Span]:
        """So many tokens, of which the first `clean` are a clean frame's. None is empty, which some NPU operators
        refuse."""
        spans = ((slice(0, clean), vectors.clean), (slice(clean, tokens), vectors.noisy))
        return [(span, self(vector)) for span, vector in spans if span.start < span.stop]


class Stream(NamedTuple):
    """Consecutive tokens of a chunk with the same weights. tokens: which of the chunk. spans: of these."""

    tokens: slice
    spans: list[Span]
    text: bool = False

    def normed(self, ops: PlainOperators, x: Tensor, shift: int) -> Tensor:
        """The norm of this stream's x [B, n, D], with a shift and the scale that follows it."""
        return joined(
            [ops.modulated_layer_norm(x[:, span], mod[shift], mod[shift + 1], EPS) for span, mod in self.spans]
        )

    def gated(self, ops: PlainOperators, x: Tensor, update: Tensor, gate: int) -> list[Tensor]:
        """x + gate * update of each span."""
        return [ops.gated_add(x[:, span], update[:, span], mod[gate]) for span, mod in self.spans]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Consecutive tokens [B, n, ...] in one tensor. A single part stays as it is, of which torch.cat makes a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Attention(nn.Module):
    """The projections of an attention, and the norms of each head's query and key. joint: with further ones for the
    text. out: whether there are output projections."""

    def __init__(self, dim: int, head_dim: int, *, joint: bool):
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=EPS) for _ in range(2))
        if joint:
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, eps=EPS) for _ in range(2))
            self.to_add_out = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [B, S, heads, head_dim] of x [B, S, D]."""
        return self._heads(x, (self.to_q, self.norm_q), (self.to_k, self.norm_k), (self.to_v, None))

    def text_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._heads(
            x, (self.add_q_proj, self.norm_added_q), (self.add_k_proj, self.norm_added_k), (self.add_v_proj, None)
        )

    def _heads(self, x: Tensor, *layers: tuple[nn.Module, nn.RMSNorm | None]) -> tuple[Tensor, ...]:
        split = [(layer(x).unflatten(2, (-1, self.head_dim)), norm) for layer, norm in layers]
        return tuple(x if norm is None else self.ops.rms_norm(x, norm.weight, EPS) for x, norm in split)

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: RotaryTable, attend: Attend | None
    ) -> Tensor:
        """[B, S, D]; the rotary table turns no token of the text."""
        query, key = self.ops.rotary(query, rotary), self.ops.rotary(key, rotary)
        return self.sequence.attention(query, key, value, attend).flatten(2)


class DoubleBlock(nn.Module):
    """Joint attention of video and text, and a feed-forward for each."""

    def __init__(self, dim: int, head_dim: int, ffn_dim: int, tp: WholeWeights | TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = Attention(dim, head_dim, joint=True)
        self.ff, self.ff_context = (
            FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate") for _ in range(2)
        )

    def forward(
        self,
        x: Tensor,
        chunk: Chunk,
        vectors: Vectors,
        rotary: RotaryTable | None = None,
        self_attention: SelfAttention | None = None,
    ) -> Tensor:
        """x [B, S, D] -> as x; without a self_attention: what the video's attention reads [B, chunk.video, D], which
        is asked for through the block itself, as FSDP gathers its weights for a call of it."""
        streams = self._streams(chunk, vectors, x.shape[1] if self_attention else chunk.video)
        if self_attention is None:
            return joined([one.normed(self.ops, x[:, one.tokens], 0) for one in streams] or [x[:, :0]])

        def attended(attend: Attend | None) -> Tensor:
            normed = [(one.normed(self.ops, x[:, one.tokens], 0), one.text) for one in streams]
            heads = [self.attn.text_heads(part) if text else self.attn.heads(part) for part, text in normed]
            made = self.attn.attended(*map(joined, zip(*heads)), rotary, attend)
            return joined([self._out(made[:, one.tokens], one.text) for one in streams])

        made = self_attention(attended)
        return joined([part for one in streams for part in self._after(one, x[:, one.tokens], made[:, one.tokens])])

    def _streams(self, chunk: Chunk, vectors: Vectors, length: int) -> list[Stream]:
        video = Stream(slice(0, chunk.video), self.norm1.spans(chunk.video, vectors, chunk.clean))
        text = slice(chunk.video, length)
        both = video, Stream(text, self.norm1_context.spans(length - chunk.video, vectors), text=True)
        return [one for one in both if one.spans]

    def _after(self, stream: Stream, x: Tensor, attended: Tensor) -> list[Tensor]:
        """The spans of a stream after the attention and the feed-forward."""
        x = joined(stream.gated(self.ops, x, attended, 2))
        return stream.gated(self.ops, x, self._fed(stream.normed(self.ops, x, 3), stream.text), 5)

    def _out(self, x: Tensor, text: bool) -> Tensor:
        return self.tp.row_linear(self.ops, self.attn.to_add_out if text else self.attn.to_out[0], x)

    def _fed(self, x: Tensor, text: bool) -> Tensor:
        widen, _, narrow = (self.ff_context if text else self.ff).net
        return self.tp.row_linear(self.ops, narrow, self.ops.gelu(widen.proj(x)))


class SingleBlock(nn.Module):
    """Attention and feed-forward in parallel, with one set of weights for all tokens."""

    def __init__(self, dim: int, head_dim: int, ffn_dim: int, tp: WholeWeights | TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = Modulation(dim, 3)
        self.attn = Attention(dim, head_dim, joint=False)
        self.proj_mlp = nn.Linear(dim, ffn_dim)
        self.proj_out_attn, self.proj_out_mlp = nn.Linear(dim, dim, bias=False), nn.Linear(ffn_dim, dim)

    def forward(
        self, x: Tensor, chunk: Chunk, vectors: Vectors, rotary: RotaryTable, self_attention: SelfAttention
    ) -> Tensor:
        """x [B, S, D]"""
        stream = Stream(slice(None), self.norm.spans(x.shape[1], vectors, chunk.clean))
        normed = stream.normed(self.ops, x, 0)

        def attended(attend: Attend | None) -> Tensor:
            return self.attn.attended(*self.attn.heads(normed), rotary, attend)

        made = self.tp.row_linear(self.ops, self.proj_out_attn, self_attention(attended))
        made = made + self.tp.row_linear(self.ops, self.proj_out_mlp, self.ops.gelu(self.proj_mlp(normed)))
        return joined(stream.gated(self.ops, x, made, 2))
