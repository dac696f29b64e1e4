"""The Wan VAE on one tile of the frames, one latent frame at a time.

The network is diffusers' AutoencoderKLWan. Modules that read other pixels or earlier frames (convolutions, resamplers,
attention) are replaced by subclasses of their class. Each caches the frames that its next call reads, including the
halos received from neighbours, so that no halo is sent twice.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    WanUpsample,
    patchify,
    unpatchify,
)  # fmt: skip
from torch import Tensor, nn

from ....ops.memory import most_allocated
from ....ops.vae import attend_pixels, channel_norm, convolve_3d, frames_format
from ....parallel.tiles import Edges, Tile, single_tile

Write = Callable[[Tensor, Tensor], object]  # see Stream.extended
FRAMES = 4  # video frames for each latent frame but the first, which has one


@dataclass
class Stream:
    """The state of one video in the encoder or decoder: this rank's tile, and the cached frames of each module."""

    tile: Tile
    memory_format: torch.memory_format
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)

    def halo(self, vertical: int, horizontal: int) -> tuple[Edges, tuple[int, int]]:
        """For a kernel that reads so many pixels on each side: (the halo to fill, along which the plane is cut; the
        zeros with which the kernel pads by itself, without a copy of its input, along which it is not)."""
        grid = self.tile.grid
        top = vertical if len(grid.heights) > 1 else 0
        left = horizontal if len(grid.widths) > 1 else 0
        return (left, left, top, top), (vertical - top, horizontal - left)

    def extended(
        self, x: Tensor, edges: Edges, kept: Tensor | None, before: int, write: Write = Tensor.copy_
    ) -> Tensor:
        """x [..., T, h, w] with its halo, after `before` earlier frames: the cached ones, or zeros.

        write(out, x): writes x, or a pixel-wise function of it, to out. The tile's borders are written first, so that
        their exchange overlaps with the rest.
        """
        left, right, top, bottom = edges
        *others, frames, height, width = x.shape
        shape = (*others, before + frames, top + height + bottom, left + width + right)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.memory_format)
        past = out[..., :before, :, :]
        if kept is None:
            past.zero_()
        else:
            past.copy_(kept)
        new = out[..., before:, :, :]
        inner = new[..., top : top + height, left : left + width]
        for area in self.tile.sent_first(edges):
            write(inner[(..., *area)], x[(..., *area)])
        arrive = self.tile.fill_edges(new, edges)
        write(inner, x)
        arrive()
        return out


class StreamedConv3d(WanCausalConv3d):
    """A causal convolution that caches the last frames of earlier calls."""

    stream: Stream

    def forward(self, x: Tensor, cache_x: None = None, write: Write = Tensor.copy_) -> Tensor:
        """x: [B, C, T, h, w]; write: a pixel-wise function that is applied first (see Stream.extended)"""
        horizontal, _, vertical, _, before, _ = self._padding
        halo, padding = self.stream.halo(vertical, horizontal)
        if before or any(halo):
            x = self.stream.extended(x, halo, self.stream.kept.get(self), before, write)
        if before:
            self.stream.kept[self] = x[:, :, -before:].clone()
        return convolve_3d(x, self.weight, self.bias, self.stride, (0, *padding))


class TiledConv2d(nn.Conv2d):
    """A convolution that reads its neighbours' pixels."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        """x: [frames, C, h, w]"""
        halo, padding = self.stream.halo(*self.padding)
        if any(halo):
            x = self.stream.extended(x.unsqueeze(2), halo, None, 0).squeeze(2)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding)


class TiledPad2d(nn.ZeroPad2d):
    """The padding of a strided convolution, with the neighbours' pixels beyond the last row and column."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        """x: [frames, C, h, w]"""
        return self.stream.extended(x.unsqueeze(2), self.padding, None, 0).squeeze(2)


class ExactUpsample(WanUpsample):
    """The same pixels, which the original converts to fp32 and back."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [frames, C, h, w]"""
        return nn.Upsample.forward(self, x)


class StreamedResample(WanResample):
    """Doubles or halves the resolution and the number of frames, except for the first frame, which stays one."""

    stream: Stream

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        """x: [1, C, T, h, w]"""
        if self.mode == "upsample3d":
            x = self._more_frames(x)
        x = self.resample(x[0].transpose(0, 1)).transpose(0, 1)[None]
        return self._fewer_frames(x) if self.mode == "downsample3d" else x

    def _more_frames(self, x: Tensor) -> Tensor:
        """Makes two frames of each frame but the first, which the convolution does not read."""
        if self not in self.stream.kept:
            self.stream.kept[self] = x.new_empty(0)
            return x
        return self.time_conv(x).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)

    def _fewer_frames(self, x: Tensor) -> Tensor:
        """Makes one frame of two."""
        last = self.stream.kept.get(self)
        self.stream.kept[self] = x[:, :, -1:].clone()
        return x if last is None else self.time_conv(torch.cat([last, x], dim=2))


class ScaledNorm(WanRMS_norm):
    """The same norm in fewer passes over the frames."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...]"""
        return channel_norm(x, self.gamma * self.scale)

    def write_activated(self, out: Tensor, x: Tensor) -> None:
        """Writes silu(norm(x)) to out: once, as an NPU copies a part of a larger tensor for each operator."""
        torch.ops.aten.silu(self(x), out=out)


class StreamedResidual(WanResidualBlock):
    """Writes norms directly to the padded inputs of the convolutions."""

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        """x: [B, C, T, h, w]"""
        out = self.conv1(x, write=self.norm1.write_activated)
        return self.conv2(out, write=self.norm2.write_activated).add_(self.conv_shortcut(x))


class TiledAttention(WanAttentionBlock):
    """Each pixel attends to the pixels of all tiles, frame by frame."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, C, T, h, w]"""
        frames = x[0].transpose(0, 1)
        query, key_value = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).split([self.dim, 2 * self.dim], 2)
        key, value = self.stream.tile.gather(key_value).chunk(2, dim=2)  # [T, H*W, C] each
        attended = attend_pixels(query, key, value)
        out = self.proj(attended.transpose(1, 2).unflatten(2, frames.shape[2:]))
        return x + out.transpose(0, 1)


STREAMED_CLASSES = {
    WanCausalConv3d: StreamedConv3d,
    WanResample: StreamedResample,
    WanUpsample: ExactUpsample,
    WanRMS_norm: ScaledNorm,
    WanResidualBlock: StreamedResidual,
    WanAttentionBlock: TiledAttention,
    nn.Conv2d: TiledConv2d,
    nn.ZeroPad2d: TiledPad2d,
}


def streamed(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Makes the modules of a VAE stream, in place. Parameters and their names do not change."""
    for module in vae.modules():
        if type(module) in STREAMED_CLASSES:
            module.__class__ = STREAMED_CLASSES[type(module)]  # like FSDP2: nothing is built or copied
        elif isinstance(module, nn.SiLU):
            module.inplace = True  # it always follows a norm, whose output nothing else reads
    return vae


def decoded(vae: AutoencoderKLWan, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
    """Decodes each frame [C, h, w] of a latent's tile, not normalised, to frames [3, t, h', w'] in -1..1."""
    for frames in decoder_output(vae, latent, tile):
        yield unpatched(vae, frames).clamp_(-1, 1)[0]


def decoder_output(vae: AutoencoderKLWan, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
    """Like `decoded`, but returns patches [1, 3 * patch_size**2, t, h, w] instead of pixels."""
    stream = Stream(tile, frames_format(vae.device.type))
    for index, frame in enumerate(latent):
        yield _decode(vae, frame, stream, first=index == 0)


def encoded(vae: AutoencoderKLWan, video: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
    """Encodes each group of the tile's frames [3, t, h', w'] in -1..1 to a latent frame [C, h, w], not normalised: the
    mean of the VAE's distribution. The first group has one frame, the others have FRAMES."""
    stream = Stream(tile, frames_format(vae.device.type))
    for frames in video:
        yield _encode(vae, frames, stream)


def _decode(vae: AutoencoderKLWan, frame: Tensor, stream: Stream, first: bool) -> Tensor:
    with _streaming(vae, stream):
        return vae.decoder(vae.post_quant_conv(frame[None, :, None]), first_chunk=first)


def _encode(vae: AutoencoderKLWan, frames: Tensor, stream: Stream) -> Tensor:
    with _streaming(vae, stream):
        return vae.quant_conv(vae.encoder(_patched(vae, frames.unsqueeze(0))))[0, : vae.config.z_dim, 0]


@contextmanager
def _streaming(vae: AutoencoderKLWan, stream: Stream):
    """Attaches the stream to all modules for one pass; between passes another video may begin."""
    parts = [module for module in vae.modules() if type(module) in STREAMED_CLASSES.values()]
    for part in parts:
        part.stream = stream
    try:
        yield
    finally:
        for part in parts:
            del part.stream


def _patched(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    return video if vae.config.patch_size is None else patchify(video, vae.config.patch_size)


def unpatched(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    return video if vae.config.patch_size is None else unpatchify(video, vae.config.patch_size)


def bytes_needed(vae: AutoencoderKLWan, work: str, height: int, width: int) -> int:
    """The bytes needed to "decode" or "encode" a tile of a latent of height x width, without the weights and what
    kernels allocate internally. Does not depend on the number of frames."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}  # without its path
    return _bytes_needed(json.dumps(config), vae.dtype, work, height, width)


@lru_cache(maxsize=64)
def _bytes_needed(config: str, dtype: torch.dtype, work: str, height: int, width: int) -> int:
    with torch.device("meta"):
        vae = streamed(nn.Module.to(AutoencoderKLWan.from_config(json.loads(config)), dtype))
    tile, pixels = single_tile(height, width), vae.config.scale_factor_spatial
    sizes = [(vae.config.z_dim, height, width)] * 3  # the peak does not change after the third frame
    if work == "encode":
        sizes = [(3, frames, pixels * height, pixels * width) for frames in (1, FRAMES, FRAMES)]
    given = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    passes = decoded(vae, given, tile) if work == "decode" else encoded(vae, given, tile)
    return most_allocated(lambda: deque(passes, maxlen=1))
