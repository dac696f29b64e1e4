"""The HunyuanVideo VAE on one tile of the frames, layer by layer, all frames in each layer.

The network is diffusers' AutoencoderKLHunyuanVideo, and so is the result, with `use_framewise_decoding`,
`use_framewise_encoding` and tiling off: the middle's attention sees the frames up to its own. (ComfyUI 0.3.75 attends
to all frames: other latents and frames. The original's
decoder computes tiles: see video_vae.py.)

Its group norms span all frames, so no frame leaves a layer before all have entered it. A layer's frames are a queue of
chunks: a layer takes them from its input one by one, which is freed as its output grows. At most two tensors of all
frames are held, in the widest layer 256 values a pixel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoMidBlock3D,
    HunyuanVideoResnetBlockCausal3D,
)  # fmt: skip
from torch import Tensor, nn

from ....ops.vae import attend_pixels, convolve_3d, frames_format
from ....parallel.tiles import Tile
from ...shared.group_norm import normed_over

KERNEL = 3  # frames, rows and columns that a convolution reads
Chunks = deque  # the chunks [1, C, t, h, w] of a tile's frames; the first has one frame
Write = Callable[[Tensor, Tensor], object]  # (out, x): writes a pixel-wise function of x to out
Passes = Generator[None, None, Chunks]  # yields after each pass over the frames


class Causal:
    """One pass of a causal convolution of 3 x 3 x 3 over a tile's frames.

    Beyond the tile it reads its neighbours' pixels, and beyond the plane and before the first frame the nearest ones.
    """

    def __init__(self, layer: HunyuanVideoCausalConv3d, tile: Tile):
        self._conv, self._tile = layer.conv, tile
        self._past: Tensor | None = None  # the last frames that the next chunk reads, with their halo

    def __call__(self, x: Tensor, write: Write = Tensor.copy_, size: tuple[int, ...] | None = None) -> Tensor:
        """Convolves what `write` makes of a chunk x [1, C, t, h, w]. size: [t, h, w] of it, if that is not x's."""
        stride, before = self._conv.stride, KERNEL - 1
        if self._past is not None:
            before = self._past.shape[2]
        edges = (1, 2 - stride[2], 1, 2 - stride[1])  # left, right, top, bottom: sizes are even where it strides
        (left, right, top, bottom), (frames, height, width) = edges, size or x.shape[2:]
        shape = (*x.shape[:2], before + frames, top + height + bottom, left + width + right)
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=frames_format(x.device.type))
        new = padded[:, :, before:]
        inner = new[..., top : top + height, left : left + width]
        if size is not None:
            write(inner, x)
        else:  # the borders first, so that their exchange overlaps with the rest
            for area in self._tile.sent_first(edges):
                write(inner[(..., *area)], x[(..., *area)])
        arrive = self._tile.fill_edges(new, edges, replicate=True)
        if size is None:
            write(inner, x)
        arrive()
        padded[:, :, :before].copy_(new[:, :, :1] if self._past is None else self._past)
        self._past = padded[:, :, stride[0] - KERNEL :].clone()
        return convolve_3d(padded, self._conv.weight, self._conv.bias, stride, (0, 0, 0))


class Layers(NamedTuple):
    """The network's layers on a tile. Collective over the ranks with a tile of its grid."""

    tile: Tile

    def convolved(self, layer: HunyuanVideoCausalConv3d, video: Iterable[Tensor]) -> Passes:
        causal = Causal(layer, self.tile)
        made = Chunks(map(causal, video))
        yield
        return made

    def residual(self, block: HunyuanVideoResnetBlockCausal3D, video: Chunks) -> Passes:
        """Holds the input and the middle; a shortcut takes the input's place."""
        activated, causal = self._activated(block.norm1, video), Causal(block.conv1, self.tile)
        middle, inputs = Chunks(), Chunks()
        while video:
            x = video.popleft()
            middle.append(causal(x, activated))
            inputs.append(x if block.conv_shortcut is None else _pointwise(block.conv_shortcut.conv, x))
            del x
        yield
        activated, causal = self._activated(block.norm2, middle), Causal(block.conv2, self.tile)
        made = Chunks()
        while middle:
            made.append(causal(middle.popleft(), activated).add_(inputs.popleft()))
        yield
        return made

    def attended(self, block: Attention, video: Chunks) -> Passes:
        """Each pixel attends to those of all tiles in its own frame and the ones before. Equal to a mask over all
        pixels, which would take the square of their number."""
        normed, keys = normed_over(block.group_norm, video, self.tile), None
        frames = len(video)
        for index in range(frames):
            x = video.popleft()
            tokens = normed(x)[0, :, 0].flatten(1).t()[None]  # [1, h*w, C]
            gathered = self.tile.gather(torch.cat((block.to_k(tokens), block.to_v(tokens)), dim=2))
            if keys is None:  # [2, 1, frames*H*W, C]: keys and values
                keys = gathered.new_empty(2, 1, frames * gathered.shape[1], tokens.shape[2])
            end = (index + 1) * gathered.shape[1]
            keys[:, :, end - gathered.shape[1] : end].copy_(torch.stack(gathered.chunk(2, dim=2)))
            made = block.to_out[0](attend_pixels(block.to_q(tokens), *keys[:, :, :end]))
            video.append(x + made.transpose(1, 2).view_as(x[:, :, 0]).unsqueeze(2))
        yield
        return video

    def middle(self, block: HunyuanVideoMidBlock3D, video: Chunks) -> Passes:
        video = yield from self.residual(block.resnets[0], video)
        for attention, resnet in zip(block.attentions, block.resnets[1:]):
            if attention is not None:
                video = yield from self.attended(attention, video)
            video = yield from self.residual(resnet, video)
        return video

    def enlarged(self, layer: nn.Module, video: Chunks) -> Passes:
        """Doubles rows, columns and maybe frames by repeating them, of the first frame rows and columns only; then
        convolves."""
        causal, made = Causal(layer.conv, self.tile), Chunks()
        factors = (1, *layer.upsample_factor[1:])
        while video:
            x = video.popleft()
            size = tuple(side * factor for side, factor in zip(x.shape[2:], factors))
            made.append(causal(x, _repeat, size))
            factors = layer.upsample_factor
        yield
        return made

    def head(self, norm: nn.GroupNorm, layer: HunyuanVideoCausalConv3d, video: Chunks) -> Iterator[Tensor]:
        """The network's output, chunk by chunk."""
        activated, causal = self._activated(norm, video), Causal(layer, self.tile)
        while video:
            yield causal(video.popleft(), activated)

    def _activated(self, norm: nn.GroupNorm, video: Chunks) -> Write:
        """Writes silu(norm(x)): once, as an NPU copies a part of a larger tensor for each operator."""
        normed = normed_over(norm, video, self.tile)
        return lambda out, x: torch.ops.aten.silu(normed(x), out=out)


def decoded(vae: AutoencoderKLHunyuanVideo, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
    """Decodes the frames [C, 1, h, w] of a latent's tile, not normalised, to frames [3, t, h', w'], not clipped to
    -1..1: None for each of `passes_of(vae.decoder)`, then the frames of each latent frame."""
    layers, network = Layers(tile), vae.decoder
    given = (_pointwise(vae.post_quant_conv, frame[None]) for frame in latent)
    video = yield from layers.convolved(network.conv_in, given)
    video = yield from layers.middle(network.mid_block, video)
    for block in network.up_blocks:
        for resnet in block.resnets:
            video = yield from layers.residual(resnet, video)
        for upsampler in block.upsamplers or ():
            video = yield from layers.enlarged(upsampler, video)
    for made in layers.head(network.conv_norm_out, network.conv_out, video):
        yield made[0]


def encoded(vae: AutoencoderKLHunyuanVideo, frames: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
    """Encodes the tile's frames [3, t, h', w'] in -1..1 of each latent frame to the latent [C, 1, h, w], not
    normalised: the mean of the VAE's distribution. Yields None for each of `passes_of(vae.encoder)` first."""
    layers, network = Layers(tile), vae.encoder
    video = yield from layers.convolved(network.conv_in, (group[None] for group in frames))
    for block in network.down_blocks:
        for resnet in block.resnets:
            video = yield from layers.residual(resnet, video)
        for downsampler in block.downsamplers or ():
            video = yield from _convolved_in_turn(layers, downsampler.conv, video)
    video = yield from layers.middle(network.mid_block, video)
    for made in layers.head(network.conv_norm_out, network.conv_out, video):
        yield _pointwise(vae.quant_conv, made)[0, : vae.config.latent_channels]


def passes_of(network: nn.Module) -> int:
    """The number of passes over all frames before an encoder or decoder yields the first ones."""
    convolutions = [module for module in network.modules() if isinstance(module, HunyuanVideoCausalConv3d)]
    attentions = sum(isinstance(module, Attention) for module in network.modules())
    return sum(module.conv.kernel_size[0] == KERNEL for module in convolutions) + attentions - 1


def _convolved_in_turn(layers: Layers, layer: HunyuanVideoCausalConv3d, video: Chunks) -> Passes:
    """`Layers.convolved` that frees its input."""
    return layers.convolved(layer, (video.popleft() for _ in range(len(video))))


def _pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    return convolve_3d(x, conv.weight, conv.bias, (1, 1, 1), (0, 0, 0))


def _repeat(out: Tensor, x: Tensor) -> None:
    """Writes x [1, C, t, h, w], each pixel repeated, to a larger out."""
    dims = (2, 4, 6)
    for dim, side in zip(dims, x.shape[2:]):
        out = out.unflatten(dim, (side, -1))
        x = x.unsqueeze(dim + 1)
    out.copy_(x)
