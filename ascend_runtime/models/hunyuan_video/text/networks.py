"""The networks that read HunyuanVideo's prompts and images: a Llama, CLIP's text model, and LLaVA's vision tower.

Parameters have transformers' names. What is not read is not there: the Llama's last two layers and its last norm, and
the vision tower's last layer and norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import LEFT_OUT_LAYERS, SEEN_LAYER, ClipSizes, ClipTextSizes, LlamaSizes, VisionSizes


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, times the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LlamaAttention(nn.Module):
    """Causal attention with fewer heads of keys and values than of queries."""

    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        self.sizes = sizes
        own, shared = sizes.heads * sizes.head_dim, sizes.key_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.width, own, bias=False)
        self.k_proj = nn.Linear(sizes.width, shared, bias=False)
        self.v_proj = nn.Linear(sizes.width, shared, bias=False)
        self.o_proj = nn.Linear(own, sizes.width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: int) -> Tensor:
        query, key, value = (_heads(layer(x), self.sizes.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key = _rotated(query, *rotary), _rotated(key, *rotary)
        repeats = self.sizes.heads // self.sizes.key_heads
        key, value = (x[:, :, :seen].repeat_interleave(repeats, 1) for x in (key, value))
        return self.o_proj(_attended(query, key, value, causal=True))


class LlamaFeedForward(nn.Module):
    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.feed_forward, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.feed_forward, bias=False)
        self.down_proj = nn.Linear(sizes.feed_forward, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        self.input_layernorm = RmsNorm(sizes.width, sizes.eps)
        self.self_attn = LlamaAttention(sizes)
        self.post_attention_layernorm = RmsNorm(sizes.width, sizes.eps)
        self.mlp = LlamaFeedForward(sizes)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaText(nn.Module):
    """All layers but the last two, without a norm after them: transformers' hidden_states[-3].

    Llama: Touvron et al., arXiv 2302.13971; rotary positions of halves, not of neighbouring channels, as transformers
    stores the weights.
    """

    def __init__(self, sizes: LlamaSizes, left_out: int = LEFT_OUT_LAYERS):
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(LlamaLayer(sizes) for _ in range(sizes.layers - left_out))

    def forward(self, ids: Tensor, images: Mapping[int, Tensor] | None = None, padding: int = 0) -> Tensor:
        """ids [1, S] -> [1, S, D].

        images: tokens [1, I, D] of images in the place of one token each, by its place; the result has them all.
        padding: the number of last tokens that no other token attends to.
        """
        x = self.embed_tokens(ids)
        for at, image in sorted((images or {}).items(), reverse=True):
            x = torch.cat([x[:, :at], image.to(x), x[:, at + 1 :]], 1)
        rotary = self._rotary(x)
        for layer in self.layers:
            x = layer(x, rotary, x.shape[1] - padding)
        return x

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, head_dim] of the positions from 0, computed in fp32."""
        channels = torch.arange(0, self.sizes.head_dim, 2, dtype=torch.float32, device=x.device)
        frequencies = 1.0 / self.sizes.theta ** (channels / self.sizes.head_dim)
        positions = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class ClipAttention(nn.Module):
    def __init__(self, sizes: ClipSizes, causal: bool):
        super().__init__()
        self.head_dim, self.causal = sizes.width // sizes.heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(sizes.width, sizes.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(_attended(*heads, self.causal))


class ClipFeedForward(nn.Module):
    def __init__(self, sizes: ClipSizes):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(sizes.width, sizes.feed_forward), nn.Linear(sizes.feed_forward, sizes.width)
        self.activation = F.gelu if sizes.activation == "gelu" else _quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    def __init__(self, sizes: ClipSizes, causal: bool):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(sizes.width, eps=sizes.eps) for _ in range(2))
        self.self_attn, self.mlp = ClipAttention(sizes, causal), ClipFeedForward(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nn.Module):
    def __init__(self, sizes: ClipSizes, layers: int, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(sizes, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipTextEmbeddings(nn.Module):
    def __init__(self, sizes: ClipTextSizes):
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.vocabulary, sizes.stack.width)
        self.position_embedding = nn.Embedding(sizes.positions, sizes.stack.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))


class ClipText(nn.Module):
    """CLIP's text model (Radford et al., arXiv 2103.00020): the normed states, not projected."""

    def __init__(self, sizes: ClipTextSizes):
        super().__init__()
        self.sizes = sizes
        self.embeddings = ClipTextEmbeddings(sizes)
        self.encoder = ClipEncoder(sizes.stack, sizes.stack.layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(sizes.stack.width, eps=sizes.stack.eps)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, S] -> [1, S, D]. That of the first end token is the prompt's vector."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class VisionEmbeddings(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width = sizes.stack.width
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, sizes.patch, sizes.patch, bias=False)
        self.position_embedding = nn.Embedding(sizes.tokens + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1)
        return tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))


class Projector(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.linear_1 = nn.Linear(sizes.stack.width, sizes.width)
        self.linear_2 = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class LlavaVision(nn.Module):
    """The image tokens of LLaVA (Liu et al., arXiv 2310.03744): CLIP's hidden state before its last layer, without the
    class token, through two linear layers."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.sizes = sizes
        self.embeddings = VisionEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.stack.width, eps=sizes.stack.eps)  # transformers' spelling
        self.encoder = ClipEncoder(sizes.stack, sizes.stack.layers + SEEN_LAYER + 1, causal=False)
        self.multi_modal_projector = Projector(sizes)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [1, 3, side, side], normalised -> [1, tokens, D]."""
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.multi_modal_projector(hidden[:, 1:])


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[1, S, heads * head_dim] -> [1, heads, S, head_dim]"""
    return x.unflatten(2, (-1, head_dim)).transpose(1, 2)


def _attended(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention [1, heads, S, head_dim] -> [1, S, heads * head_dim], with plain operators, which every device has. Keys
    and values may be those of fewer first tokens."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if causal:
        rows, columns = (torch.arange(length, device=scores.device) for length in scores.shape[2:])
        scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, heads, S, head_dim], each channel turned with the one half of the channels further."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
