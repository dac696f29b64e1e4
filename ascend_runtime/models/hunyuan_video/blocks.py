"""The blocks of the HunyuanVideo transformer: double ones, then single ones.

One tensor of tokens [video | text] goes through all blocks. A double block has weights of its own for video and text,
a single block one set for all tokens. A rank's chunk begins with its tokens of the video; the rest is text, and padding
that no attention reads. Parameters have diffusers' names, except for a single block's `proj_out`, which is two matrices
here: what reads the attention, and what reads the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ...ops import PlainOperators
from ...ops.plain import RotaryTable
from ...ops.precision import MODULATION
from ...parallel.sequence import SequenceLayout
from ...parallel.tensor import TensorParallel, WholeWeights
from ..shared.block_stack import Attend

EPS = 1e-6
SelfAttention = Callable[[Callable[[Attend | None], Tensor]], Tensor]  # see block_stack.Pass.attention


class Chunk(NamedTuple):
    """The tokens of this rank. video: the number of the video's, which come first. clean: how many of these belong to a
    first frame that is known, and is modulated by a vector of its own."""

    video: int
    clean: int = 0


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Parts of a sequence [B, some, ...], one after the other; not copied if there is one."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class Modulated:
    """Shifts, scales and gates of a stream's tokens.

    rows [B, vectors, number, D] in fp32: of the noisy tokens, then those of the first `clean` tokens.
    """

    ops: PlainOperators
    rows: Tensor
    clean: int

    def normed(self, x: Tensor, number: int) -> Tensor:
        """The layer norm of the stream's tokens x [B, S, D] with shift `number` and the scale behind it."""
        return self._by_vector(
            lambda row, x: self.ops.modulated_layer_norm(x, row(number), row(number + 1), EPS), x
        )  # fmt: skip

    def gated(self, x: Tensor, update: Tensor, number: int) -> Tensor:
        """x plus update times gate `number`; both [B, S, D]."""
        return self._by_vector(lambda row, x, update: self.ops.gated_add(x, update, row(number)), x, update)

    def _by_vector(self, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`compute` of tokens and of what modulates them. The clean tokens are few: what the noisy ones' vector makes
        of them is overwritten, which costs less than to join two parts."""
        if self.clean == tensors[0].shape[1]:
            return compute(self._row(1), *tensors)
        made = compute(self._row(0), *tensors)
        if self.clean:
            made[:, : self.clean] = compute(self._row(1), *(x[:, : self.clean] for x in tensors))
        return made

    def _row(self, vector: int) -> Callable[[int], Tensor]:
        return lambda number: self.rows[:, vector, number].unsqueeze(1)


class Modulation(nn.Module):
    """Shifts, scales and gates: a linear layer of a vector's SiLU, which is computed once for all blocks."""

    def __init__(self, dim: int, number: int):
        super().__init__()
        self.linear = nn.Linear(dim, number * dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, V, number, D] in fp32, of the SiLU of vectors [B, V, D]."""
        return as_rows(self.linear(vectors), vectors)


def as_rows(made: Tensor, vectors: Tensor) -> Tensor:
    """What modulation layers made [B, V, number * D] of vectors [B, V, D], as [B, V, number, D] in fp32."""
    return made.to(MODULATION.dtype).unflatten(-1, (-1, vectors.shape[-1]))


class Operated(nn.Module):
    """A module that computes with exchangeable operators, which the network sets."""

    ops: PlainOperators


class JointAttention(Operated):
    """The projections of an attention, and the norms of each head's query and key. joint: with further ones for the
    text, and with output projections."""

    sequence: SequenceLayout

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

    def heads(self, x: Tensor) -> list[Tensor]:
        """Query, key and value [B, S, heads, head_dim] of x [B, S, D]."""
        return self._heads(x, (self.to_q, self.norm_q), (self.to_k, self.norm_k), (self.to_v, None))

    def text_heads(self, x: Tensor) -> list[Tensor]:
        """The same by the text's layers."""
        return self._heads(
            x, (self.add_q_proj, self.norm_added_q), (self.add_k_proj, self.norm_added_k), (self.add_v_proj, None)
        )

    def _heads(self, x: Tensor, *layers: tuple[nn.Module, nn.RMSNorm | None]) -> list[Tensor]:
        split = ((layer(x).unflatten(2, (-1, self.head_dim)), norm) for layer, norm in layers)
        return [x if norm is None else self.ops.rms_norm(x, norm.weight, EPS) for x, norm in split]

    def attended(self, heads: list[Tensor], rotary: RotaryTable, attend: Attend | None) -> Tensor:
        """[B, S, D]. heads: query, key and value, taken out of the list to free them here. rotary: a table that turns
        no token of the text."""
        value, key, query = heads.pop(), heads.pop(), heads.pop()
        query, key = self.ops.rotary(query, rotary), self.ops.rotary(key, rotary)
        return self.sequence.attention(query, key, value, attend).flatten(2)


class Stream(NamedTuple):
    """The tokens of a double block's stream, video or text, with their layers. place: of them in the chunk."""

    place: slice
    modulated: Modulated
    heads: Callable[[Tensor], list[Tensor]]
    out: nn.Module
    ff: FeedForward


class DoubleBlock(Operated):
    """Joint attention of video and text, and a feed-forward for each."""

    def __init__(self, dim: int, head_dim: int, ffn_dim: int, tp: WholeWeights | TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = JointAttention(dim, head_dim, joint=True)
        self.ff, self.ff_context = (
            FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate") for _ in range(2)
        )

    def forward(
        self,
        x: Tensor,
        chunk: Chunk,
        vectors: Tensor,
        rotary: RotaryTable | None = None,
        self_attention: SelfAttention | None = None,
    ) -> Tensor:
        """x [B, S, D] -> as x; without a self_attention: what the video's attention reads [B, chunk.video, D], which is
        asked for through the block itself, as FSDP gathers its weights for a call of it. vectors [B, 1 or 2, D]: the
        SiLU of what modulates noisy tokens, and clean ones."""
        if self_attention is None:
            return self._indicator(x[:, : chunk.video], chunk, vectors)
        streams = self._streams(chunk, vectors, x.shape[1])
        parts = self._attention(x, streams, rotary, self_attention)
        return joined(self._fed(part, stream) for part, stream in zip(parts, streams))

    def _indicator(self, video: Tensor, chunk: Chunk, vectors: Tensor) -> Tensor:
        if not chunk.video:
            return video
        (rows,) = self.tp.gathered(vectors, self.norm1.linear)
        return Modulated(self.ops, as_rows(rows, vectors), chunk.clean).normed(video, 0)

    def _streams(self, chunk: Chunk, vectors: Tensor, tokens: int) -> list[Stream]:
        """Without an empty one, as NPU operators may refuse tensors without rows."""
        attn, streams = self.attn, []
        if chunk.video:
            streams.append((self.norm1, slice(0, chunk.video), chunk.clean, attn.heads, attn.to_out[0], self.ff))
        if chunk.video < tokens:
            text = slice(chunk.video, tokens)
            streams.append((self.norm1_context, text, 0, attn.text_heads, attn.to_add_out, self.ff_context))
        made = self.tp.gathered(vectors, *(norm.linear for norm, *_ in streams))
        return [
            Stream(place, Modulated(self.ops, as_rows(rows, vectors), clean), heads, out, ff)
            for rows, (_, place, clean, heads, out, ff) in zip(made, streams)
        ]

    def _attention(
        self, x: Tensor, streams: list[Stream], rotary: RotaryTable, self_attention: SelfAttention
    ) -> list[Tensor]:
        """Each stream's tokens after the attention."""

        def attended(attend: Attend | None) -> Tensor:
            heads = (stream.heads(stream.modulated.normed(x[:, stream.place], 0)) for stream in streams)
            made = self.attn.attended([joined(each) for each in zip(*heads)], rotary, attend)
            return joined(self.tp.row_linear(self.ops, stream.out, made[:, stream.place]) for stream in streams)

        made = self_attention(attended)
        return [stream.modulated.gated(x[:, stream.place], made[:, stream.place], 2) for stream in streams]

    def _fed(self, x: Tensor, stream: Stream) -> Tensor:
        """As much as the gate needs is in memory when it adds: the inner activations are not."""
        widen, _, narrow = stream.ff.net

        def update() -> Tensor:
            inner = self.ops.gelu(widen.proj(stream.modulated.normed(x, 3)))
            return self.tp.row_linear(self.ops, narrow, inner)

        return stream.modulated.gated(x, update(), 5)


class SingleBlock(Operated):
    """Attention and feed-forward in parallel, with one set of weights for all tokens."""

    def __init__(self, dim: int, head_dim: int, ffn_dim: int, tp: WholeWeights | TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = Modulation(dim, 3)
        self.attn = JointAttention(dim, head_dim, joint=False)
        self.proj_mlp = nn.Linear(dim, ffn_dim)
        self.proj_out_attn, self.proj_out_mlp = nn.Linear(dim, dim, bias=False), nn.Linear(ffn_dim, dim)

    def forward(
        self, x: Tensor, chunk: Chunk, vectors: Tensor, rotary: RotaryTable, self_attention: SelfAttention
    ) -> Tensor:
        """x [B, S, D] -> as x; see DoubleBlock."""
        (rows,) = self.tp.gathered(vectors, self.norm.linear)
        modulated = Modulated(self.ops, as_rows(rows, vectors), chunk.clean)
        return modulated.gated(x, self._update(modulated.normed(x, 0), rotary, self_attention), 2)

    def _update(self, normed: Tensor, rotary: RotaryTable, self_attention: SelfAttention) -> Tensor:
        def attended(attend: Attend | None) -> Tensor:
            return self.attn.attended(self.attn.heads(normed), rotary, attend)

        attention = self_attention(attended)
        fed = self.ops.gelu(self.proj_mlp(normed))
        return self.tp.row_linears(self.ops, (self.proj_out_mlp, fed), (self.proj_out_attn, attention))
