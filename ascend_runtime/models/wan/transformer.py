"""The Wan diffusion transformer (2.1 and 2.2): our blocks and block stack, diffusers' embedders and head.

Parameters carry diffusers' names. Written for one device: `PlainOperators` or another set computes, and `Sequence`
says how the tokens are spread, if they are.
diffusers' own block modulates and upcasts inside its forward, where no fused operator, cache or per-token
modulation can reach: hence ours, which equals it (tests/ranks/test_wan_blocks.py).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Callable

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ...ops import PlainOperators
from ...ops.plain import RotaryTable
from ...parallel.sequence import Sequence, WholeSequence
from ...parallel.tensor import TensorParallel, WholeWeights
from ..block_stack import EVERYTHING, Attend, Pass, Stack
from ..context import Context
from ..quantized import QuantizedLinear

# Kept in fp32 whatever the dtype of the blocks, as diffusers does: small, and the quality of every step hangs on them.
FP32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
# How tensor parallelism cuts a block's layers: by columns, whole heads or a part of the feed-forward's width, with
# their biases and the norms of query and key; or by rows, whose bias stays whole. What is not named is not cut.
COLUMNS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "norm_q", "norm_k", "norm_added_k")
ROWS = ("to_out.0", "ffn.net.2")
UNCUT = ("input_scale", "input_offset")  # of a quantized layer
# Which layers of a block are kept in 8 bits on demand: all but the one that msModelSlim's recipes for Wan leave alone
# too, whose inputs have a few values far above all others.
IN_8_BITS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0", "ffn.net.0.proj")
MASK_CHANNELS = 4  # of an image-to-video model: the mask of a latent frame's 4 frames

# Mean and standard deviation of the latents of the Wan 2.1 VAE, as published in its diffusers config.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# A picture of a latent without its VAE, by its channels: RGB weights in -1..1 of each normalised channel, and a bias.
# The figures are those of ComfyUI's latent formats Wan21 and Wan22.
LATENT_RGB = {
    16: {"bias": (-0.1835, -0.0868, -0.3360), "factors": (
        (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
        (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
        (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
    )},
    48: {"bias": (0.0317, -0.0878, -0.1388), "factors": (
        (0.0119, 0.0103, 0.0046), (-0.1062, -0.0504, 0.0165), (0.0140, 0.0409, 0.0491), (-0.0813, -0.0677, 0.0607),
        (0.0656, 0.0851, 0.0808), (0.0264, 0.0463, 0.0912), (0.0295, 0.0326, 0.0590), (-0.0244, -0.0270, 0.0025),
        (0.0443, -0.0102, 0.0288), (-0.0465, -0.0090, -0.0205), (0.0359, 0.0236, 0.0082), (-0.0776, 0.0854, 0.1048),
        (0.0564, 0.0264, 0.0561), (0.0006, 0.0594, 0.0418), (-0.0319, -0.0542, -0.0637), (-0.0268, 0.0024, 0.0260),
        (0.0539, 0.0265, 0.0358), (-0.0359, -0.0312, -0.0287), (-0.0285, -0.1032, -0.1237), (0.1041, 0.0537, 0.0622),
        (-0.0086, -0.0374, -0.0051), (0.0390, 0.0670, 0.2863), (0.0069, 0.0144, 0.0082), (0.0006, -0.0167, 0.0079),
        (0.0313, -0.0574, -0.0232), (-0.1454, -0.0902, -0.0481), (0.0714, 0.0827, 0.0447), (-0.0304, -0.0574, -0.0196),
        (0.0401, 0.0384, 0.0204), (-0.0758, -0.0297, -0.0014), (0.0568, 0.1307, 0.1372), (-0.0055, -0.0310, -0.0380),
        (0.0239, -0.0305, 0.0325), (-0.0663, -0.0673, -0.0140), (-0.0416, -0.0047, -0.0023), (0.0166, 0.0112, -0.0093),
        (-0.0211, 0.0011, 0.0331), (0.1833, 0.1466, 0.2250), (-0.0368, 0.0370, 0.0295), (-0.3441, -0.3543, -0.2008),
        (-0.0479, -0.0489, -0.0420), (-0.0660, -0.0153, 0.0800), (-0.0101, 0.0068, 0.0156), (-0.0690, -0.0452, -0.0927),
        (-0.0145, 0.0041, 0.0015), (0.0421, 0.0451, 0.0373), (0.0504, -0.0483, -0.0356), (-0.0837, 0.0168, 0.0055),
    )},
}  # fmt: skip


def keeps_fp32(name: str) -> bool:
    """Whether a parameter is in fp32 whatever the dtype of the blocks."""
    return any(part in name for part in FP32_PARAMETERS)


def replicated(name: str) -> bool:
    """Whether every rank keeps a parameter whole under FSDP, which gathers one dtype at a time: what is in fp32 within
    a unit of the blocks' dtype."""
    return keeps_fp32(name) and "time_embedder" not in name


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: every rank has all of it."""
    layer, _, kind = name.rpartition(".")
    if not name.startswith("blocks."):
        return None
    if layer.endswith(COLUMNS):
        return None if kind in (*UNCUT, "mul_scale") else 0
    return {"weight": 1, "mul_scale": 0}.get(kind) if layer.endswith(ROWS) else None


def kept_in_8_bits(layer: str) -> bool:
    """Whether a layer is quantized where a model is to be as it is read."""
    return layer.startswith("blocks.") and layer.endswith(IN_8_BITS)


def _check_tensor_parallel(heads: int, ffn_dim: int, degree: int) -> None:
    most = math.gcd(heads, ffn_dim)
    if most % degree:
        legal = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise ValueError(
            f"tp_degree is {degree}, which does not cut this model into equal slices: it has {heads} heads and a "
            f"feed-forward {ffn_dim} wide. Set it to one of {legal}; put other ranks on ulysses_degree or ring_degree."
        )


class WanAttention(nn.Module):
    """What both attentions of a block have: projections, and norms of query and key over all heads."""

    def __init__(self, dim: int, heads: int, eps: float, tp: WholeWeights | TensorParallel):
        super().__init__()
        self.head_dim = dim // heads
        self.eps = eps
        self.tp = tp
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))

    def _normed(self, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Each tensor [B, S, D], normalised by the norm beside it, as heads."""
        return [self._heads(x) for x in self.tp.rms_norms(self.ops, self.eps, *pairs)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim))


class WanSelfAttention(WanAttention):
    """Attention of the video's tokens among themselves, with rotary positions."""

    def forward(self, x: Tensor, rotary: RotaryTable, attend: Attend | None = None) -> Tensor:
        """x [B, S, D]; rotary: the table of these S tokens; attend: another attention than the operators'."""
        query, key = self._normed((self.norm_q, self.to_q(x)), (self.norm_k, self.to_k(x)))
        value = self._heads(self.to_v(x))
        query, key = self.ops.rotary(query, rotary), self.ops.rotary(key, rotary)
        out = self.sequence.attention(query, key, value, attend)
        return self.tp.row_linear(self.ops, self.to_out[0], out.flatten(2))


class WanCrossAttention(WanAttention):
    """Attention of the video's tokens to the text and, in image-to-video models of Wan 2.1, to an image."""

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
        """Each with the norm that it needs."""
        keys = [(self.norm_k, self.to_k(text))]
        return keys if image is None else [*keys, (self.norm_added_k, self.add_k_proj(image))]

    def _values(self, text: Tensor, image: Tensor | None) -> list[Tensor]:
        values = [self.to_v(text)] if image is None else [self.to_v(text), self.add_v_proj(image)]
        return [self._heads(value) for value in values]


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and the last modulated by the timestep."""

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
        """x [B, S, D]; timestep: its projection [B, 6, D], or [B, S, 6, D] with one timestep a token.

        self_attention: decides whether it is computed, and by which attention (see accelerate.passes.Pass).
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
        """What `ffn`, whose parameters are diffusers', computes."""
        widen, _, narrow = self.ffn.net
        return self.tp.row_linear(self.ops, narrow, self.ops.gelu(widen.proj(x)))


class WanTransformer(nn.Module):
    """The network: predicts the velocity of a noisy latent.

    config: that of diffusers' WanTransformer3DModel, by name. Built on the meta device, its rotary tables aside.
    tp: how the blocks' weights are cut; they are built whole, and `load_weights` reads this rank's slices (`cut_dim`).
    Raises ValueError where they cannot be cut so.
    """

    def __init__(self, config: dict, tp: WholeWeights | TensorParallel = WholeWeights()):
        super().__init__()
        with torch.device("meta"):
            shell = WanTransformer3DModel.from_config({**config, "num_layers": 0})
        self.config = shell.config
        _check_tensor_parallel(self.config.num_attention_heads, self.config.ffn_dim, tp.degree)
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
                for _ in range(config.get("num_layers", 40))
            )
        self._rotary: tuple[torch.Size, RotaryTable] | None = None
        self.arrange(PlainOperators())

    @property
    def units(self) -> list[nn.Module]:
        """What FSDP gathers at once, in the order in which they begin."""
        return [self.condition_embedder, self.condition_embedder.time_embedder, *self.blocks]

    def arrange(self, operators: PlainOperators, sequence: Sequence | None = None) -> None:
        """Says which operators compute from now on, and how the tokens are spread over ranks (None: all are here)."""
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

        latent [B, C, T, H, W], H and W even; timestep [B] in 0..1000, or [B, S] with one a token; context: a new one,
        or that of earlier passes with the same prompt; passing: what of the blocks is computed.
        """
        rotary = tuple(self.sequence.split(part) for part in self._rotary_table(latent))
        tokens = self.patch_embedding(latent).flatten(2).transpose(1, 2)
        length = tokens.shape[1]
        if timestep.ndim == 2:  # split before it is embedded: six vectors a token are large
            timestep = self.sequence.split(timestep)
        embedded, projected = self._condition(timestep, context)
        tokens = self.sequence.split(tokens).contiguous()

        def run(number: int, tokens: Tensor) -> Tensor:
            self_attention = partial(passing.attention, number)
            return self.blocks[number](tokens, context, projected, rotary, self_attention)

        tokens = passing.blocks(Stack(run, len(self.blocks), projected), tokens)
        tokens = self.sequence.gather(self._head(tokens, embedded), length)
        return self._unpatchify(tokens, latent.shape)

    def _condition(self, timestep: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The timestep embedded [B, 1 or S, D] and projected [B, (S,) 6, D]; embeds the context if it is new."""
        new = context.embedded is None
        # The embedder wants a text in any case; of one token it costs nothing.
        text, image = (context.text, context.image) if new else (context.text[:, :1], None)
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        embedded, projected, *prompt = self.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=per_token
        )
        if new:
            context.embedded = tuple(prompt)
        if per_token is None:
            embedded = embedded.unsqueeze(1)
        return embedded, projected.unflatten(-1, (6, -1))

    def _head(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """tokens [B, S, D] -> patches [B, S, prod(patch) * C_out]."""
        modulation = self.ops.modulation(self.scale_shift_table.unsqueeze(1), embedded.unsqueeze(2))
        shift, scale = modulation.unbind(2)
        return self.proj_out(self.ops.modulated_layer_norm(tokens, shift, scale, self.norm_out.eps))

    def _unpatchify(self, patches: Tensor, latent_shape: torch.Size) -> Tensor:
        """[B, S, pt*ph*pw*C] -> [B, C, T, H, W]."""
        pt, ph, pw = self.config.patch_size
        _, _, frames, height, width = latent_shape
        grid = patches.unflatten(1, (frames // pt, height // ph, width // pw)).unflatten(-1, (pt, ph, pw, -1))
        video = grid.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, T/pt, pt, H/ph, ph, W/pw, pw]
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _rotary_table(self, latent: Tensor) -> RotaryTable:
        """The table of a latent of this size, kept until another size comes or `forget` is called."""
        if self._rotary is None or self._rotary[0] != latent.shape:
            table = self.ops.rotary_table(*self.rope(latent))
            self._rotary = latent.shape, tuple(part.to(latent.device) for part in table)
        return self._rotary[1]

    def forget(self) -> None:
        """Frees what was kept between the steps of one generation."""
        self._rotary = None
