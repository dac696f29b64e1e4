"""The HunyuanVideo diffusion transformer: our blocks, block stack and embedders.

Parameters have diffusers' names (see `blocks` for the one exception). Written for one device: the operators
(`PlainOperators`) and the `SequenceLayout` are exchangeable. The text is the tail of the video's sequence, so that
every way to spread a sequence over ranks works for both. It equals diffusers' HunyuanVideoTransformer3DModel
(tests/ranks/test_hunyuan_blocks.py).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from ...hardware import devices
from ...ops import PlainOperators
from ...ops.plain import RotaryTable
from ...parallel.sequence import SequenceLayout, WholeSequence
from ...parallel.tensor import TensorParallel, WholeWeights, check_degree
from ..shared.block_stack import EVERYTHING, BlockStack, Pass
from ..shared.quantized.base import QuantizedLinear
from ..shared.transformer import KeptTables
from .blocks import EPS, Chunk, DoubleBlock, JointAttention, Operated, SingleBlock, joined
from .context import Context
from .embedders import TextRefiner, TimeTextEmbedding
from .files.configs import EITHER, REPLACE, TRANSFORMER_DEFAULTS

# diffusers' network without what is ours; it does not know the image_condition_type EITHER, and nothing of it is used.
SHELL = {"num_layers": 0, "num_single_layers": 0, "num_refiner_layers": 0, "image_condition_type": None}


class HunyuanVideoTransformer(nn.Module):
    """The network: predicts the velocity of a noisy latent.

    config: fields of diffusers' HunyuanVideoTransformer3DModel. Built on the meta device, except for rotary tables.
    tp: how the blocks' weights are cut; they are built whole, and `load_weights` reads this rank's slices (`cut_dim`).
    Raises ValueError if the degree does not divide the model.
    """

    def __init__(self, config: dict, tp: WholeWeights | TensorParallel = WholeWeights()):
        super().__init__()
        with torch.device("meta"):
            shell = HunyuanVideoTransformer3DModel.from_config(config | SHELL)
        own = {name: config.get(name, {**TRANSFORMER_DEFAULTS, "image_condition_type": EITHER}[name]) for name in SHELL}
        self.config = FrozenDict({**shell.config, **own})
        self.x_embedder, self.rope = shell.x_embedder, shell.rope
        self.norm_out, self.proj_out = shell.norm_out, shell.proj_out
        with torch.device("meta"):
            self._add_layers(tp)
        self._rotary = KeptTables()
        self.ops: PlainOperators | None = None
        self.arrange(PlainOperators())

    def _add_layers(self, tp: WholeWeights | TensorParallel) -> None:
        config, head_dim = self.config, self.config.attention_head_dim
        dim = config.num_attention_heads * head_dim
        ffn_dim = int(dim * config.mlp_ratio)
        check_degree(config.num_attention_heads, ffn_dim, tp.degree)
        self.time_text_embed = TimeTextEmbedding(dim, config.pooled_projection_dim, guided=config.guidance_embeds)
        self.context_embedder = TextRefiner(config.text_embed_dim, dim, head_dim, config.num_refiner_layers)
        self.transformer_blocks, self.single_transformer_blocks = (
            nn.ModuleList(kind(dim, head_dim, ffn_dim, tp) for _ in range(number))
            for kind, number in ((DoubleBlock, config.num_layers), (SingleBlock, config.num_single_layers))
        )

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    @property
    def units(self) -> list[nn.Module]:
        """The modules that FSDP gathers as units, in the order of their first use."""
        return [self.time_text_embed, self.context_embedder, *self.blocks]

    def arrange(self, operators: PlainOperators, sequence: SequenceLayout | None = None) -> None:
        """Sets the operators, and how the tokens are spread over ranks (None: all tokens are on this rank)."""
        if operators is not self.ops:  # they decide the form of rotary tables
            self.forget()
        self.ops = operators
        self.sequence = sequence or WholeSequence(operators.attention)
        for module in self.modules():
            if isinstance(module, (Operated, QuantizedLinear)):
                module.ops = operators
            if isinstance(module, JointAttention):
                module.sequence = self.sequence

    def forward(self, latent: Tensor, timestep: Tensor, context: Context, passing: Pass = EVERYTHING) -> Tensor:
        """The velocity [B, C_out, T, H, W].

        latent [B, C, T, H, W], H and W even; timestep [B] in 0..1000, in fp32; passing: decides which blocks are
        computed.
        """
        clean = self.config.image_condition_type == REPLACE if context.clean is None else context.clean
        whole = context.whole_vector
        vectors = F.silu(self.time_text_embed(timestep, context.pooled, context.guidance, clean, whole))
        text = self.context_embedder(context.text, timestep, context.mean)
        patches = self._patches(latent)
        video, behind = patches.shape[1], text.shape[1]
        rotary = tuple(self.sequence.split(part) for part in self._rotary_table(latent, behind))
        tokens = self._tokens(patches, text)
        frame = video // (latent.shape[2] // self.config.patch_size_t) if clean else 0
        own = self.sequence.own
        chunk = Chunk(own(video, behind), own(frame, video + behind - frame))

        def run(number: int, tokens: Tensor) -> Tensor:
            return self.blocks[number](tokens, chunk, vectors, rotary, partial(passing.attention, number))

        def indicator(tokens: Tensor, _: int) -> Tensor:
            return self.blocks[0](tokens, chunk, vectors)

        tokens = passing.blocks(BlockStack(run, len(self.blocks), indicator), tokens)
        patches = self._head(tokens, vectors, chunk.clean if whole else 0)
        return self._unpatchify(self.sequence.gather(patches, video + behind)[:, :video], latent.shape)

    def _tokens(self, patches: Tensor, text: Tensor) -> Tensor:
        """This rank's chunk of the tokens [video | text | padding], of patches [B, S, C * prod(patch)] and text
        [B, L, D]. Only its own patches are embedded."""
        video, length = patches.shape[1], patches.shape[1] + text.shape[1]
        place = self.sequence.place(length)
        parts = []
        if place.start < min(place.stop, video):
            layer = self.x_embedder.proj
            own = patches[:, place.start : min(place.stop, video)]
            parts.append(F.linear(own, layer.weight.flatten(1), layer.bias))  # a convolution of separate patches
        if max(place.start, video) < place.stop:
            parts.append(text[:, max(place.start - video, 0) : place.stop - video])
        if padding := self.sequence.chunk_of(length) - (place.stop - place.start):
            parts.append(text.new_zeros(text.shape[0], padding, text.shape[2]))
        return joined(parts).contiguous()

    def _patches(self, latent: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, S, C*pt*ph*pw]."""
        pt, p = self.config.patch_size_t, self.config.patch_size
        grid = latent.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, pt))
        return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, T/pt, H/p, W/p, C, pt, p, p] before

    def _head(self, tokens: Tensor, vectors: Tensor, clean: int) -> Tensor:
        """tokens [B, S, D], of which so many are modulated as clean; the SiLU of vectors [B, 1 or 2, D] -> patches
        [B, S, C_out*pt*ph*pw]."""
        if clean:
            parts = [self._head(tokens[:, :clean], vectors[:, 1:], 0)]
            if clean < tokens.shape[1]:
                parts.append(self._head(tokens[:, clean:], vectors[:, :1], 0))
            return torch.cat(parts, dim=1)
        scale, shift = self.norm_out.linear(vectors[:, :1]).float().chunk(2, dim=-1)
        return self.proj_out(self.ops.modulated_layer_norm(tokens, shift, scale, EPS))

    def _unpatchify(self, patches: Tensor, latent_shape: torch.Size) -> Tensor:
        """[B, S, C*pt*ph*pw] -> [B, C, T, H, W]."""
        pt, p = self.config.patch_size_t, self.config.patch_size
        _, _, frames, height, width = latent_shape
        grid = patches.unflatten(1, (frames // pt, height // p, width // p)).unflatten(-1, (-1, pt, p, p))
        video = grid.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, C, T/pt, pt, H/p, p, W/p, p]
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _rotary_table(self, latent: Tensor, behind: int) -> RotaryTable:
        """The rotary table for a latent of this size and `behind` tokens of text, which are not turned; kept until
        `forget` is called, as guidance takes turns with two texts."""

        def made() -> RotaryTable:
            cos, sin = self.rope(latent.new_empty(latent.shape, device="meta" if latent.is_meta else "cpu"))
            cos, sin = F.pad(cos, (0, 0, 0, behind), value=1.0), F.pad(sin, (0, 0, 0, behind))
            table = self.ops.rotary_table(cos[None, :, None], sin[None, :, None])
            return tuple(devices.sent(part, latent.device) for part in table)

        return self._rotary.get((latent.shape, behind), made)

    def forget(self) -> None:
        """Frees what is cached between the steps of one generation."""
        self._rotary.clear()
