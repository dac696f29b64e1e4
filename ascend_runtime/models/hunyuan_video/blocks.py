"""The blocks of the HunyuanVideo transformer: double ones, then single ones.

One tensor of tokens [video | text] goes through all blocks. A double block has weights of its own for video and text,
a single block one set for all tokens. A rank's chunk begins with its `Tokens.video` tokens of the video; the rest is
text, and padding that no attention reads. Parameters have diffusers' names, except for a single block's `proj_out`,
which is two matrices here: what reads the attention, and what reads the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ...ops.plain import RotaryTable
from ...ops.precision import MODULATION
from ...parallel.tensor import TensorParallel, WholeWeights
from ..shared.block_stack import Attend

EPS = 1e-6
SelfAttention = Callable[[Callable[[Attend | None], Tensor]], Tensor]  # see block_stack.Pass.attention


class Tokens(NamedTuple):
    """A rank's chunk of tokens. video: the number of the video's, which come first. clean: how many of these belong to
    a first frame that is known and clean, and is modulated by a vector of its own."""

    video: int
    clean: int = 0

    @property
    def spans(self) -> tuple[slice, slice]:
        """The video's clean tokens, and its others."""
        return slice(0, self.clean), slice(self.clean, self.video)


class Vectors(NamedTuple):
    """What modulates tokens, each [B, D]. noisy: those of the video and the text; clean: a clean first frame's."""

    noisy: Tensor
    clean: Tensor | None = None


class Modulation(nn.Module):
    """Shifts, scales and gates: a linear layer of a vector's SiLU."""

    def __init__(self, dim: int, number: int):
        super().__init__()
        self.linear = nn.Linear(dim, number * dim)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, 1, D] in fp32, of a vector [B, D]."""
        made = self.linear(F.silu(vector)).to(MODULATION.dtype)
        return made.unsqueeze(1).unflatten(-1, (-1, vector.shape[1])).unbind(2)


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
        tokens: Tokens,
        vectors: Vectors,
        rotary: RotaryTable | None = None,
        self_attention: SelfAttention | None = None,
    ) -> Tensor:
        """x [B, S, D] -> as x; without a self_attention: what the video's attention reads [B, tokens.video, D], which
        is asked for through the block itself, as FSDP gathers its weights for a call of it."""
        spans = self._spans(tokens, vectors, video_only=self_attention is None)
        if self_attention is None:
            return self._normed(x, spans, 0)

        def attended(attend: Attend | None) -> Tensor:
            parts = self._streams(self._normed(x, spans, 0), tokens)
            heads = [self.attn.text_heads(part) if text else self.attn.heads(part) for part, text in parts]
            made = self.attn.attended(*(torch.cat(each, 1) for each in zip(*heads)), rotary, attend)
            out = [self._out(part, text) for part, text in self._streams(made, tokens)]
            return torch.cat(out, 1)

        x = self._gated(x, self_attention(attended), spans, 2)
        fed = [self._fed(part, text) for part, text in self._streams(self._normed(x, spans, 3), tokens)]
        return self._gated(x, torch.cat(fed, 1), spans, 5)

    def _spans(self, tokens: Tokens, vectors: Vectors, video_only: bool) -> list[tuple[slice, tuple[Tensor, ...]]]:
        """(tokens, their shifts, scales and gates)"""
        clean, noisy = tokens.spans
        spans = [(clean, self.norm1, vectors.clean), (noisy, self.norm1, vectors.noisy)]
        if not video_only:
            spans.append((slice(tokens.video, None), self.norm1_context, vectors.noisy))
        return [(span, norm(vector)) for span, norm, vector in spans if span.stop is None or span.stop > span.start]

    def _normed(self, x: Tensor, spans, first: int) -> Tensor:
        parts = [self.ops.modulated_layer_norm(x[:, span], mod[first], mod[first + 1], EPS) for span, mod in spans
                 if x[:, span].shape[1]]  # fmt: skip
        return torch.cat(parts, 1) if parts else x[:, :0]  # the video's tokens, on a rank that has none

    def _gated(self, x: Tensor, update: Tensor, spans, gate: int) -> Tensor:
        return torch.cat(
            [self.ops.gated_add(x[:, span], update[:, span], mod[gate]) for span, mod in spans
             if x[:, span].shape[1]], 1
        )  # fmt: skip

    def _streams(self, x: Tensor, tokens: Tokens) -> list[tuple[Tensor, bool]]:
        """(x's tokens of a stream, whether it is the text), without empty ones, which some NPU operators refuse."""
        parts = ((x[:, : tokens.video], False), (x[:, tokens.video :], True))
        return [(part, text) for part, text in parts if part.shape[1]]

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
        self, x: Tensor, tokens: Tokens, vectors: Vectors, rotary: RotaryTable, self_attention: SelfAttention
    ) -> Tensor:
        """x [B, S, D]"""
        clean, _ = tokens.spans
        spans = [(clean, self.norm(vectors.clean))] if tokens.clean else []
        spans.append((slice(tokens.clean, None), self.norm(vectors.noisy)))
        spans = [(span, mod) for span, mod in spans if x[:, span].shape[1]]
        normed = torch.cat([self.ops.modulated_layer_norm(x[:, span], *mod[:2], EPS) for span, mod in spans], 1)

        def attended(attend: Attend | None) -> Tensor:
            return self.attn.attended(*self.attn.heads(normed), rotary, attend)

        made = self.tp.row_linear(self.ops, self.proj_out_attn, self_attention(attended))
        made = made + self.tp.row_linear(self.ops, self.proj_out_mlp, self.ops.gelu(self.proj_mlp(normed)))
        return torch.cat([self.ops.gated_add(x[:, span], made[:, span], mod[2]) for span, mod in spans], 1)
