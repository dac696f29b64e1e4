"""The HunyuanVideo diffusion transformer: our blocks and block stack, diffusers' embedders and head.

Parameters have diffusers' names (see `blocks` for the one exception). Written for one device: the operators
(`PlainOperators`) and the `SequenceLayout` are exchangeable. The text is the tail of the video's sequence, so that
every way to spread a sequence over ranks works for both.
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
from ...parallel.tensor import TensorParallel, WholeWeights
from ..shared.block_stack import EVERYTHING, BlockStack, Pass
from ..shared.quantized import QuantizedLinear
from .blocks import EPS, Attention, Chunk, DoubleBlock, SingleBlock, Vectors
from .context import Context
from .files.configs import TRANSFORMER_DEFAULTS

TOKEN_REPLACE = "token_replace"  # the image_condition_type of models that read a clean first frame


class HunyuanVideoTransformer(nn.Module):
    """The network: predicts the velocity of a noisy latent.

    config: fields of diffusers' HunyuanVideoTransformer3DModel. Built on the meta device, except for rotary tables.
    tp: how the blocks' weights are cut; they are built whole, and `load_weights` reads this rank's slices (`cut_dim`).
    """

    def __init__(self, config: dict, tp: WholeWeights | TensorParallel = WholeWeights()):
        super().__init__()
        with torch.device("meta"):
            shell = HunyuanVideoTransformer3DModel.from_config({**config, "num_layers": 0, "num_single_layers": 0})
        layers = {name: config.get(name, TRANSFORMER_DEFAULTS[name]) for name in ("num_layers", "num_single_layers")}
        self.config = FrozenDict({**shell.config, **layers})
        head_dim = self.config.attention_head_dim
        dim = self.config.num_attention_heads * head_dim
        ffn_dim = int(dim * self.config.mlp_ratio)
        self.x_embedder, self.context_embedder = shell.x_embedder, shell.context_embedder
        self.time_text_embed, self.norm_out, self.proj_out = shell.time_text_embed, shell.norm_out, shell.proj_out
        self.rope = shell.rope
        with torch.device("meta"):
            self.transformer_blocks = nn.ModuleList(
                DoubleBlock(dim, head_dim, ffn_dim, tp) for _ in range(self.config.num_layers)
            )
            self.single_transformer_blocks = nn.ModuleList(
                SingleBlock(dim, head_dim, ffn_dim, tp) for _ in range(self.config.num_single_layers)
            )
        self._rotary: tuple[tuple, RotaryTable] | None = None
        self.arrange(PlainOperators())

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    @property
    def units(self) -> list[nn.Module]:
        """The modules that FSDP gathers as units, in the order of their first use."""
        return [self.time_text_embed, self.context_embedder, *self.blocks]

    def arrange(self, operators: PlainOperators, sequence: SequenceLayout | None = None) -> None:
        """Sets the operators, and how the tokens are spread over ranks (None: all tokens are on this rank)."""
        self.forget()
        self.ops = operators
        self.sequence = sequence or WholeSequence(operators.attention)
        for module in self.modules():
            if isinstance(module, (DoubleBlock, SingleBlock, Attention, QuantizedLinear)):
                module.ops, module.sequence = self.ops, self.sequence

    def forward(self, latent: Tensor, timestep: Tensor, context: Context, passing: Pass = EVERYTHING) -> Tensor:
        """The velocity [B, C_out, T, H, W].

        latent [B, C, T, H, W], H and W even; timestep [B] in 0..1000; passing: decides which blocks are computed.
        """
        video = self.x_embedder(latent)
        text = self.context_embedder(context.text, timestep)
        length, behind = video.shape[1], text.shape[1]
        noisy, clean = self.time_text_embed(timestep, context.pooled, context.guidance)
        vectors = Vectors(F.silu(noisy), None if clean is None else F.silu(clean))
        rotary = tuple(self.sequence.split(part) for part in self._rotary_table(latent, behind))
        tokens = self.sequence.split(torch.cat([video, text], 1)).contiguous()
        first = 0 if clean is None else length // (latent.shape[2] // self.config.patch_size_t)
        own = Chunk(
            self.sequence.own(length, behind), self.sequence.own(first, length - first + behind) if first else 0
        )

        def run(number: int, tokens: Tensor) -> Tensor:
            return self.blocks[number](tokens, own, vectors, rotary, partial(passing.attention, number))

        def indicator(tokens: Tensor, _: int) -> Tensor:
            return self.blocks[0](tokens, own, vectors)

        tokens = passing.blocks(BlockStack(run, len(self.blocks), indicator), tokens)
        tokens = self.sequence.gather(self._head(tokens, vectors.noisy), length + behind)[:, :length]
        return self._unpatchify(tokens, latent.shape)

    def _head(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """tokens [B, S, D] -> patches [B, S, C_out * prod(patch)]. vector [B, D]: after its SiLU."""
        scale, shift = self.norm_out.linear(vector).float().unsqueeze(1).chunk(2, dim=-1)
        return self.proj_out(self.ops.modulated_layer_norm(tokens, shift, scale, EPS))

    def _unpatchify(self, patches: Tensor, latent_shape: torch.Size) -> Tensor:
        """[B, S, C*pt*ph*pw] -> [B, C, T, H, W]."""
        pt, p = self.config.patch_size_t, self.config.patch_size
        _, _, frames, height, width = latent_shape
        grid = patches.unflatten(1, (frames // pt, height // p, width // p)).unflatten(-1, (-1, pt, p, p))
        video = grid.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, C, T/pt, pt, H/p, p, W/p, p]
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _rotary_table(self, latent: Tensor, behind: int) -> RotaryTable:
        """The rotary table for a latent of this size and `behind` tokens of text, which are not turned; cached until
        the size changes or `forget` is called."""
        key = latent.shape, behind
        if self._rotary is None or self._rotary[0] != key:
            cos, sin = self.rope(latent.new_empty(latent.shape, device="cpu"))
            cos, sin = F.pad(cos, (0, 0, 0, behind), value=1.0), F.pad(sin, (0, 0, 0, behind))
            table = self.ops.rotary_table(cos[None, :, None], sin[None, :, None])
            self._rotary = key, tuple(devices.sent(part, latent.device) for part in table)
        return self._rotary[1]

    def forget(self) -> None:
        """Frees what is cached between the steps of one generation."""
        self._rotary = None
