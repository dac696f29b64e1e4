"""The Toy transformer: double blocks, with weights of their own for video and text, then single blocks.

One tensor of tokens, [video | text], goes through all blocks. A rank's chunk of it begins with `own` tokens of the
video; the rest is text, and padding.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from ascend_runtime.models.shared.block_stack import EVERYTHING, BlockStack
from ascend_runtime.models.shared.quantized.base import QuantizedLinear
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.sequence import WholeSequence
from ascend_runtime.parallel.tensor import WholeWeights
from torch import nn

EPS = 1e-6
FREQUENCIES = 16  # of a timestep


class Stream(nn.Module):
    """The weights of an attention and a feed-forward, each modulated. wide: the feed-forward's width, in widths."""

    def __init__(self, width, head_dim, wide, modulations, tp):
        super().__init__()
        self.tp, self.head_dim = tp, head_dim
        self.mod = nn.Linear(width, modulations * width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)
        self.widen, self.narrow = nn.Linear(width, wide * width), nn.Linear(wide * width, width)

    def modulation(self, vector):
        """Tensors [B, 1, D] in fp32, of the vector [B, D]."""
        return self.mod(F.silu(vector)).float().unsqueeze(1).unflatten(-1, (-1, vector.shape[1])).unbind(2)

    def heads(self, x):
        """Query, key and value [B, S, heads, head_dim]."""
        query, key, value = (layer(x).unflatten(2, (-1, self.head_dim)) for layer in (self.to_q, self.to_k, self.to_v))
        normed = (self.ops.rms_norm(x, norm.weight, EPS) for x, norm in ((query, self.norm_q), (key, self.norm_k)))
        return *normed, value

    def out(self, x):
        return self.tp.row_linear(self.ops, self.to_out, x)

    def fed(self, x):
        return self.tp.row_linear(self.ops, self.narrow, self.ops.gelu(self.widen(x)))


class DoubleBlock(nn.Module):
    def __init__(self, width, head_dim, tp):
        super().__init__()
        self.video, self.text = (Stream(width, head_dim, 4, 6, tp) for _ in range(2))

    def forward(self, x, own, vector, rotary=None, self_attention=None):
        """x [B, S, D] -> as x; without a self-attention, what the video's attention reads. That is asked for through
        the block itself, as FSDP gathers its weights for a call of it."""
        if self_attention is None:
            shift, scale, *_ = self.video.modulation(vector)
            return self.ops.modulated_layer_norm(x[:, :own], shift, scale, EPS)
        streams = [(stream, part, stream.modulation(vector))
                   for stream, part in ((self.video, slice(0, own)), (self.text, slice(own, None)))
                   if x[:, part].shape[1]]  # fmt: skip

        def attended(attend):
            heads = [
                stream.heads(self.ops.modulated_layer_norm(x[:, part], *mod[:2], EPS)) for stream, part, mod in streams
            ]
            qkv = (torch.cat(parts, 1) for parts in zip(*heads))
            out = _joint(self, qkv, rotary, attend)
            return torch.cat([stream.out(out[:, part]) for stream, part, _ in streams], 1)

        made = self_attention(attended)
        parts = [self.ops.gated_add(x[:, part], made[:, part], mod[2]) for _, part, mod in streams]
        fed = []
        for (stream, _, mod), part in zip(streams, parts):
            update = stream.fed(self.ops.modulated_layer_norm(part, mod[3], mod[4], EPS))
            fed.append(self.ops.gated_add(part, update, mod[5]))
        return torch.cat(fed, 1)


class SingleBlock(Stream):
    """Attention and feed-forward in parallel, with one set of weights for all tokens."""

    def __init__(self, width, head_dim, tp):
        super().__init__(width, head_dim, 2, 3, tp)

    def forward(self, x, own, vector, rotary, self_attention):
        shift, scale, gate = self.modulation(vector)
        normed = self.ops.modulated_layer_norm(x, shift, scale, EPS)

        def attended(attend):
            return self.out(_joint(self, self.heads(normed), rotary, attend))

        return self.ops.gated_add(x, self_attention(attended) + self.fed(normed), gate)


def _joint(block, qkv, rotary, attend):
    query, key, value = qkv
    query, key = block.ops.rotary(query, rotary), block.ops.rotary(key, rotary)
    return block.sequence.attention(query, key, value, attend).flatten(2)


class Embedder(nn.Module):
    def __init__(self, width, text_dim, pooled_dim):
        super().__init__()
        self.time, self.vector = nn.Linear(2 * FREQUENCIES, width), nn.Linear(pooled_dim, width)
        self.txt = nn.Linear(text_dim, width)

    def forward(self, timestep, text, pooled):
        """The vector [B, D] and the text [B, L, D]."""
        angles = timestep[:, None].float() * 0.5 ** torch.arange(FREQUENCIES, device=timestep.device)
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(pooled.dtype)
        return self.time(waves) + self.vector(pooled), self.txt(text)


class AdaNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)


class ToyTransformer(nn.Module):
    def __init__(self, config, tp=WholeWeights()):
        super().__init__()
        self.config = {**config, "patch_size": tuple(config["patch_size"])}
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        if heads % tp.degree:
            raise ValueError(f"tp_degree is {tp.degree}; a Toy of {heads} heads can be cut by their divisors.")
        width, patch = heads * head_dim, self.config["patch_size"]
        with torch.device("meta"):
            self.patch_embedding = nn.Conv3d(config["in_channels"], width, patch, patch)
            self.condition_embedder = Embedder(width, config["text_dim"], config["pooled_dim"])
            self.double_blocks = nn.ModuleList(
                DoubleBlock(width, head_dim, tp) for _ in range(config["num_layers"])
            )
            self.single_blocks = nn.ModuleList(
                SingleBlock(width, head_dim, tp) for _ in range(config["num_single_layers"])
            )
            self.norm_out = AdaNorm(width)
            self.proj_out = nn.Linear(width, patch[1] * patch[2] * config["out_channels"])
        self.arrange(PlainOperators())

    @property
    def blocks(self):
        return [*self.double_blocks, *self.single_blocks]

    @property
    def units(self):
        return [self.condition_embedder, *self.blocks]

    def arrange(self, operators, sequence=None):
        self.ops, self.sequence = operators, sequence or WholeSequence(operators.attention)
        for module in self.modules():
            if isinstance(module, (Stream, DoubleBlock, QuantizedLinear)):
                module.ops, module.sequence = self.ops, self.sequence

    def forward(self, latent, timestep, context, passing=EVERYTHING):
        text, pooled = context
        tokens = self.patch_embedding(latent).flatten(2).transpose(1, 2)
        vector, text = self.condition_embedder(timestep, text, pooled)
        video, behind = tokens.shape[1], text.shape[1]
        rotary = tuple(self.sequence.split(part) for part in self._rotary(latent, behind))
        tokens = self.sequence.split(torch.cat([tokens, text], 1)).contiguous()
        own = self.sequence.own(video, behind)

        def run(number, tokens):
            return self.blocks[number](tokens, own, vector, rotary, partial(passing.attention, number))

        def indicator(tokens, own):
            return self.blocks[0](tokens, own, vector)

        tokens = passing.blocks(BlockStack(run, len(self.blocks), indicator), tokens)
        shift, scale = self.norm_out.linear(F.silu(vector)).float().unsqueeze(1).chunk(2, dim=-1)
        made = self.proj_out(self.ops.modulated_layer_norm(tokens, shift, scale, EPS))
        return self._unpatchified(self.sequence.gather(made, video + behind)[:, :video], latent.shape)

    def _unpatchified(self, patches, shape):
        """[B, S, C*ph*pw] -> [B, C, T, H, W]."""
        _, rows, columns = self.config["patch_size"]
        _, _, frames, height, width = shape
        grid = patches.unflatten(1, (frames, height // rows, width // columns)).unflatten(-1, (-1, rows, columns))
        return grid.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def _rotary(self, latent, behind):
        """Of the video's places; the text stays as it is."""
        _, rows, columns = self.config["patch_size"]
        sizes = (latent.shape[2], latent.shape[3] // rows, latent.shape[4] // columns)
        places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in sizes)).view(-1, 3)
        pairs = self.config["attention_head_dim"] // 2
        angles = torch.stack([places[:, pair % 3] * 0.3 ** (pair // 3) for pair in range(pairs)], 1)
        angles = F.pad(angles, (0, 0, 0, behind)).repeat_interleave(2, dim=1)[None, :, None].to(latent.device)
        return self.ops.rotary_table(angles.cos(), angles.sin())

    def forget(self):
        """Nothing is kept."""
