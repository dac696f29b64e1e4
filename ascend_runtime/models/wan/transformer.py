"""The Wan diffusion transformer (2.1 and 2.2): our blocks and block stack, diffusers' embedders and head.

Parameters have diffusers' names. Written for one device: the operators (`PlainOperators`) and the `SequenceLayout` are
exchangeable.
diffusers' own block modulates and upcasts inside its forward, which leaves no room for fused operators, caches or
per-token modulation. Our block computes the same (tests/ranks/test_wan_blocks.py).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Callable

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ...hardware import devices
from ...ops import PlainOperators
from ...ops.plain import RotaryTable
from ...parallel.sequence import SequenceLayout, WholeSequence
from ...parallel.tensor import TensorParallel, WholeWeights, check_degree
from ..shared.block_stack import EVERYTHING, Attend, BlockStack, Pass
from ..shared.networks import accepted
from ..shared.quantized.base import QuantizedLinear
from ..shared.transformer import KeptTables
from .context import Context
from .files.configs import REFERENCE_CHANNELS, TRANSFORMER_DEFAULTS

SAMPLED = 64  # with per-token timesteps, every 64th channel is compared: all would take six times the tokens' memory


def _indicator(timestep: Tensor, tokens: Tensor, own: int) -> Tensor:
    """TeaCache's indicator for Wan: the timestep projection [B, 6, D], or a sample of the per-token projections
    [B, S, 6, D], without the padding after `own` tokens."""
    return timestep if timestep.ndim == 3 else timestep[:, :own, :, ::SAMPLED]


class WanAttention(nn.Module):
    """Base of a block's two attentions: projections, and norms of query and key over all heads."""

    def __init__(self, dim: int, heads: int, eps: float, tp: WholeWeights | TensorParallel):
        super().__init__()
        self.head_dim = dim // heads
        self.eps = eps
        self.tp = tp
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))

    def _normed(self, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Applies each pair's norm to its tensor [B, S, D], and splits it into heads."""
        return [self._heads(x) for x in self.tp.rms_norms(self.ops, self.eps, *pairs)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim))


class WanSelfAttention(WanAttention):
    """Self-attention of the video tokens, with rotary position embedding."""

    def forward(self, x: Tensor, rotary: RotaryTable, attend: Attend | None = None) -> Tensor:
        """x [B, S, D]; rotary: the table for these S tokens; attend: replaces the operators' attention."""
        query, key = self._normed((self.norm_q, self.to_q(x)), (self.norm_k, self.to_k(x)))
        value = self._heads(self.to_v(x))
        query, key = self.ops.rotary(query, rotary), self.ops.rotary(key, rotary)
        out = self.sequence.attention(query, key, value, attend)
        return self.tp.row_linear(self.ops, self.to_out[0], out.flatten(2))


class WanCrossAttention(WanAttention):
    """Cross-attention of the video tokens to the text and, in Wan 2.1 image-to-video models, to an image."""

    def __init__(self, dim: int, heads: int, eps: float, tp: WholeWeights | TensorParallel, image_dim: int | None):
        super().__init__(dim, heads, eps, tp)
        if image_dim is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(image_dim, dim), nn.Linear(image_dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, S, D]"""
        query = self.norm_q, self.to_q(x)
        if self in context.keys_values:
            (query,) = self._normed(query)
            keys_values = context.keys_values[self]
        else:
            query, *keys = self._normed(query, *self._keys(*context.embedded))
            keys_values = list(zip(keys, self._values(*context.embedded)))
            if context.worth_keeping(x.shape[1]):
                context.keys_values[self] = keys_values
        outs = [self.ops.attention(query, key, value).flatten(2) for key, value in keys_values]
        return self.tp.row_linear(self.ops, self.to_out[0], sum(outs[1:], start=outs[0]))

    def _keys(self, text: Tensor, image: Tensor | None) -> list[tuple[nn.RMSNorm, Tensor]]:
        """(norm, keys) pairs of the text and, if there is one, of the image."""
        keys = [(self.norm_k, self.to_k(text))]
        return keys if image is None else [*keys, (self.norm_added_k, self.add_k_proj(image))]

    def _values(self, text: Tensor, image: Tensor | None) -> list[Tensor]:
        values = [self.to_v(text)] if image is None else [self.to_v(text), self.add_v_proj(image)]
        return [self._heads(value) for value in values]


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward; the timestep modulates the first and the last."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        *,
        eps: float = 1e-6,
        cross_attn_norm: bool = True,
        image_dim: int | None = None,
        tp: WholeWeights | TensorParallel = WholeWeights(),
    ):
        super().__init__()
        self.eps = eps
        self.tp = tp
        self.attn1 = WanSelfAttention(dim, heads, eps, tp)
        self.attn2 = WanCrossAttention(dim, heads, eps, tp, image_dim)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        context: Context,
        timestep: Tensor,
        rotary: RotaryTable,
        self_attention: Callable[[Callable[[Attend | None], Tensor]], Tensor] = lambda compute: compute(None),
    ) -> Tensor:
        """x [B, S, D]; timestep: its projection [B, 6, D], or [B, S, 6, D] with per-token timesteps.

        self_attention: decides whether self-attention is computed, and by which attention (see block_stack.Pass).
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self._modulation(timestep)

        def attended(attend: Attend | None) -> Tensor:
            return self.attn1(self.ops.modulated_layer_norm(x, shift, scale, self.eps), rotary, attend)

        x = self.ops.gated_add(x, self_attention(attended), gate)
        x = x + self.attn2(self._norm_for_text(x), context)
        fed = self._feed_forward(self.ops.modulated_layer_norm(x, ffn_shift, ffn_scale, self.eps))
        return self.ops.gated_add(x, fed, ffn_gate)

    def _modulation(self, timestep: Tensor) -> tuple[Tensor, ...]:
        """Six fp32 tensors [B, 1 or S, D]."""
        modulation = self.ops.modulation(self.scale_shift_table, timestep)
        per_token = timestep.ndim == 4
        return modulation.unbind(2) if per_token else tuple(m.unsqueeze(1) for m in modulation.unbind(1))

    def _norm_for_text(self, x: Tensor) -> Tensor:
        if isinstance(self.norm2, nn.Identity):
            return x
        return self.ops.layer_norm(x, self.norm2.weight, self.norm2.bias, self.eps)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The output of `ffn`, whose parameters are diffusers'."""
        widen, _, narrow = self.ffn.net
        return self.tp.row_linear(self.ops, narrow, self.ops.gelu(widen.proj(x)))


class WanTransformer(nn.Module):
    """The network: predicts the velocity of a noisy latent.

    config: fields of diffusers' WanTransformer3DModel. Built on the meta device, except for rotary tables.
    tp: how the blocks' weights are cut; they are built whole, and `load_weights` reads this rank's slices (`cut_dim`).
    Raises ValueError if the degree does not divide the model.
    """

    def __init__(self, config: dict, tp: WholeWeights | TensorParallel = WholeWeights()):
        super().__init__()
        reference = config.get(REFERENCE_CHANNELS)
        with torch.device("meta"):
            shell = WanTransformer3DModel.from_config({**accepted(config, WanTransformer3DModel), "num_layers": 0})
        num_layers = config.get("num_layers", TRANSFORMER_DEFAULTS["num_layers"])
        self.config = FrozenDict({**shell.config, "num_layers": num_layers, REFERENCE_CHANNELS: reference})
        check_degree(self.config.num_attention_heads, self.config.ffn_dim, tp.degree)
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        self.patch_embedding = shell.patch_embedding
        self.condition_embedder = shell.condition_embedder
        self.norm_out = shell.norm_out
        self.proj_out = shell.proj_out
        self.scale_shift_table = shell.scale_shift_table
        self.rope = type(shell.rope)(
            self.config.attention_head_dim, self.config.patch_size, self.config.rope_max_seq_len
        )
        with torch.device("meta"):
            patch = self.config.patch_size[1:]
            self.ref_conv = None if reference is None else nn.Conv2d(reference, dim, kernel_size=patch, stride=patch)
            self.blocks = nn.ModuleList(
                WanBlock(
                    dim,
                    self.config.ffn_dim,
                    self.config.num_attention_heads,
                    eps=self.config.eps,
                    cross_attn_norm=self.config.cross_attn_norm,
                    image_dim=self.config.added_kv_proj_dim,
                    tp=tp,
                )
                for _ in range(self.config.num_layers)
            )
        self._rotary = KeptTables()
        self.ops: PlainOperators | None = None
        self.arrange(PlainOperators())

    @property
    def units(self) -> list[nn.Module]:
        """The modules that FSDP gathers as units, in the order of their first use."""
        return [self.condition_embedder, self.condition_embedder.time_embedder, *self.blocks]

    def arrange(self, operators: PlainOperators, sequence: SequenceLayout | None = None) -> None:
        """Sets the operators, and how the tokens are spread over ranks (None: all tokens are on this rank)."""
        if operators is not self.ops:  # they decide the form of rotary tables
            self.forget()
        self.ops = operators
        self.sequence = sequence or WholeSequence(operators.attention)
        for block in self.blocks:
            block.ops = block.attn1.ops = block.attn2.ops = operators
            block.attn1.sequence = self.sequence
        for module in self.blocks.modules():
            if isinstance(module, QuantizedLinear):
                module.ops = operators

    def forward(self, latent: Tensor, timestep: Tensor, context: Context, passing: Pass = EVERYTHING) -> Tensor:
        """The velocity [B, C_out, T, H, W].

        latent [B, C, T, H, W], H and W even; timestep [B] in 0..1000, or [B, S] with one for each token; context: a new
        one, or that of earlier passes with the same prompt; passing: decides which blocks are computed.
        """
        tokens, frames = self._tokens(latent, context)
        rotary = tuple(self.sequence.split(part) for part in self._rotary_table(latent, frames))
        length = tokens.shape[1]
        if timestep.ndim == 2:  # split before embedding, which makes six vectors for each token
            timestep = self.sequence.split(timestep)
        embedded, projected = self._condition(timestep, context)
        tokens = self.sequence.split(tokens).contiguous()

        def run(number: int, tokens: Tensor) -> Tensor:
            self_attention = partial(passing.attention, number)
            return self.blocks[number](tokens, context, projected, rotary, self_attention)

        tokens = passing.blocks(BlockStack(run, len(self.blocks), partial(_indicator, projected)), tokens)
        patches = self.sequence.gather(self._head(tokens, embedded), length)
        return self._unpatchify(patches, latent.shape)

    def _tokens(self, latent: Tensor, context: Context) -> tuple[Tensor, int]:
        """(the tokens [B, S, D] of all ranks, the number of frames that they are of): a reference image's come first,
        as a frame before the video's."""
        tokens, frames = self.patch_embedding(latent).flatten(2).transpose(1, 2), latent.shape[2]
        if context.reference is None:
            return tokens, frames
        reference = self.ref_conv(context.reference).flatten(2).transpose(1, 2)
        return torch.cat([reference, tokens], dim=1), frames + self.config.patch_size[0]

    def _condition(self, timestep: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(the timestep embedding [B, 1 or S, D], its projection [B, (S,) 6, D]); embeds the context if it is new."""
        new = context.embedded is None
        # The embedder requires a text; one token costs almost nothing.
        text, image = (context.text, context.image) if new else (context.text[:, :1], None)
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        embedded, projected, *prompt = self.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=per_token
        )
        if new:
            context.embedded = self._embedded(*prompt, context)
        if per_token is None:
            embedded = embedded.unsqueeze(1)
        return embedded, projected.unflatten(-1, (6, -1))

    def _embedded(self, text: Tensor, image: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        """What the blocks attend to. A model that looks at an image takes the text for one that is not given, as core
        ComfyUI's does."""
        if image is None and self.config.added_kv_proj_dim is not None:
            return text, text
        return text, image if image is None or context.image_tokens is None else image[:, : context.image_tokens]

    def _head(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """tokens [B, S, D] -> patches [B, S, prod(patch) * C_out]."""
        modulation = self.ops.modulation(self.scale_shift_table.unsqueeze(1), embedded.unsqueeze(2))
        shift, scale = modulation.unbind(2)
        return self.proj_out(self.ops.modulated_layer_norm(tokens, shift, scale, self.norm_out.eps))

    def _unpatchify(self, patches: Tensor, latent_shape: torch.Size) -> Tensor:
        """[B, S, pt*ph*pw*C], of which the last are the video's -> [B, C, T, H, W]."""
        pt, ph, pw = self.config.patch_size
        _, _, frames, height, width = latent_shape
        grid = frames // pt, height // ph, width // pw
        patches = patches[:, patches.shape[1] - math.prod(grid) :]
        grid = patches.unflatten(1, grid).unflatten(-1, (pt, ph, pw, -1))
        video = grid.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, T/pt, pt, H/ph, ph, W/pw, pw]
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _rotary_table(self, latent: Tensor, frames: int | None = None) -> RotaryTable:
        """The rotary table for so many frames of a latent's size (None: its own number), kept until `forget` is
        called."""
        batch, channels, own, *plane = latent.shape
        covered = latent.new_empty(()).expand(batch, channels, frames or own, *plane)

        def made() -> RotaryTable:
            return tuple(devices.sent(part, latent.device) for part in self.ops.rotary_table(*self.rope(covered)))

        return self._rotary.get(covered.shape, made)

    def forget(self) -> None:
        """Frees what is cached between the steps of one generation."""
        self._rotary.clear()
