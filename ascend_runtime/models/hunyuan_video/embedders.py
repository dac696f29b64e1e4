"""What the HunyuanVideo transformer makes of the timestep, the guidance and the prompt before its blocks.

The modules compute as diffusers' do and have its parameter names, but attention and norms are our operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn

from ...ops.precision import NORMS
from .blocks import EPS, Modulation, Operated
from .cost import FREQUENCIES, REFINER_RATIO


class TimeTextEmbedding(nn.Module):
    """A vector of a timestep, a pooled text, and an embedded guidance scale."""

    def __init__(self, dim: int, text_dim: int, *, guided: bool = False):
        super().__init__()
        self.sinusoid = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="silu")
        self.guidance_embedder = TimestepEmbedding(FREQUENCIES, dim) if guided else None

    def forward(
        self,
        timestep: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        clean: bool = False,
        guided_clean: bool = False,
    ) -> Tensor:
        """[B, 1 or 2, D], of timestep [B] in fp32, pooled [B, text_dim], guidance [B]. clean: with a second vector for
        tokens without noise: of timestep 0, and without guidance unless guided_clean."""
        guide = 0 if guidance is None else self._embedded(self.guidance_embedder, guidance, pooled)
        made, text = self._embedded(self.timestep_embedder, timestep, pooled) + guide, self.text_embedder(pooled)
        if not clean:
            return (made + text).unsqueeze(1)
        zero = self._embedded(self.timestep_embedder, torch.zeros_like(timestep), pooled)
        return torch.stack([made, zero + guide if guided_clean else zero], 1) + text.unsqueeze(1)

    def _embedded(self, embedder: TimestepEmbedding, values: Tensor, like: Tensor) -> Tensor:
        """The sinusoid is computed in fp32 (precision.SINUSOID)."""
        return embedder(self.sinusoid(values).type_as(like))


class RefinerAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])


class RefinerBlock(Operated):
    """Attention of the text to itself, and a feed-forward; a vector gates both."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm2 = (nn.LayerNorm(dim, EPS) for _ in range(2))
        self.attn = RefinerAttention(dim)
        self.ff = FeedForward(dim, mult=REFINER_RATIO, activation_fn="linear-silu")
        self.norm_out = Modulation(dim, 2)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x [B, L, D] -> as x; vector [B, 1, D]: its SiLU."""
        attention_gate, ff_gate = self.norm_out(vector).unbind(2)
        x = self.ops.gated_add(x, self._attention(self._normed(self.norm1, x)), attention_gate)
        return self.ops.gated_add(x, self.ff(self._normed(self.norm2, x)), ff_gate)

    def _normed(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, norm.weight, norm.bias, EPS)

    def _attention(self, x: Tensor) -> Tensor:
        layers = (self.attn.to_q, self.attn.to_k, self.attn.to_v)
        heads = (layer(x).unflatten(2, (-1, self.head_dim)) for layer in layers)
        return self.attn.to_out[0](self.ops.attention(*heads).flatten(2))


class TextRefiner(nn.Module):
    """Refines the text encoder's tokens for a timestep. It is small (309 M parameters, at most 400 tokens), so that
    every rank computes all of it."""

    def __init__(self, text_dim: int, dim: int, head_dim: int, layers: int):
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(dim, text_dim)
        self.proj_in = nn.Linear(text_dim, dim)
        blocks = nn.ModuleList(RefinerBlock(dim, head_dim) for _ in range(layers))
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, text: Tensor, timestep: Tensor, mean: Tensor | None = None) -> Tensor:
        """[B, L, D] of text [B, L, text_dim] without padding, timestep [B]. mean [B, text_dim]: of the text; None: that
        of these tokens."""
        mean = text.mean(1, dtype=NORMS.dtype).type_as(text) if mean is None else mean
        vector = F.silu(self.time_text_embed(timestep, mean))
        x = self.proj_in(text)
        for block in self.token_refiner["refiner_blocks"]:
            x = block(x, vector)
        return x
