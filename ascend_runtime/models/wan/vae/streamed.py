"""The Wan VAE on one tile of the frames, a latent frame at a time.

The network is diffusers' AutoencoderKLWan. What looks beyond a pixel or back in time (convolutions, resamplers,
attention) becomes of a class derived from its own. Each keeps the frames that its next call looks back at, with the
borders that neighbours sent, so that no border is sent twice.
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
    patchify,
    unpatchify,
)  # fmt: skip
from torch import Tensor, nn

from ....ops.convolution import convolve_3d, frames_format
from ....ops.memory import most_allocated
from ....parallel.tiles import Edges, Tile, whole

Write = Callable[[Tensor, Tensor], object]  # see Stream.extended
FRAMES = 4  # of a video, for each latent frame but the first, which stands for one


@dataclass
class Stream:
    """One video's way through the encoder or the decoder: the tile that is seen, and what was seen so far."""

    tile: Tile
    memory_format: torch.memory_format
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)

    def extended(
        self, x: Tensor, edges: Edges, kept: Tensor | None, before: int, write: Write = Tensor.copy_
    ) -> Tensor:
        """x [..., T, h, w] with its edges, behind `before` frames: those that were kept, zeros where none were.

        write(out, x): puts x into out, or what a function of each pixel makes of it. Borders are made first, and travel
        while the rest is made.
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
        for place in self.tile.sent_first(edges):
            write(inner[(..., *place)], x[(..., *place)])
        arrive = self.tile.fill_edges(new, edges)
        write(inner, x)
        arrive()
        return out


class StreamedConv3d(WanCausalConv3d):
    """Looks back at the frames of its own earlier calls."""

    stream: Stream

    def forward(self, x: Tensor, cache_x: None = None, write: Write = Tensor.copy_) -> Tensor:
        """x: [B, C, T, h, w]; of what `write` makes of it (see Stream.extended)"""
        *edges, before, _ = self._padding
        if before or any(edges):
            x = self.stream.extended(x, tuple(edges), self.stream.kept.get(self), before, write)
        if before:
            self.stream.kept[self] = x[:, :, -before:].clone()
        return convolve_3d(x, self.weight, self.bias, self.stride)


class TiledConv2d(nn.Conv2d):
    """Looks at its neighbours' pixels."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        """x: [frames, C, h, w]"""
        (vertical, horizontal) = self.padding
        edges = (horizontal, horizontal, vertical, vertical)
        x = self.stream.extended(x.unsqueeze(2), edges, None, 0).squeeze(2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class TiledPad2d(nn.ZeroPad2d):
    """What a convolution with a stride reads beyond the last row and column."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        """x: [frames, C, h, w]"""
        return self.stream.extended(x.unsqueeze(2), self.padding, None, 0).squeeze(2)


class StreamedResample(WanResample):
    """Twice or half the pixels, and frames: the first frame of a video always stays one."""

    stream: Stream

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        """x: [B, C, T, h, w]"""
        if self.mode == "upsample3d":
            x = self._more_frames(x)
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return self._fewer_frames(x) if self.mode == "downsample3d" else x

    def _more_frames(self, x: Tensor) -> Tensor:
        """Two of each frame. The first is not looked back at."""
        if self not in self.stream.kept:
            self.stream.kept[self] = x.new_empty(0)
            return x
        return self.time_conv(x).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)

    def _fewer_frames(self, x: Tensor) -> Tensor:
        """One of two frames."""
        last = self.stream.kept.get(self)
        self.stream.kept[self] = x[:, :, -1:].clone()
        return x if last is None else self.time_conv(torch.cat([last, x], dim=2))


class ScaledNorm(WanRMS_norm):
    """The same norm, scaled in one step where the original takes three, each a copy of the frames."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...]"""
        return self._write(torch.empty_like(x), x)

    def write_activated(self, out: Tensor, x: Tensor) -> None:
        """Puts silu(norm(x)) into out."""
        F.silu(self._write(out, x), inplace=True)

    def _write(self, out: Tensor, x: Tensor) -> Tensor:
        """In fp32 inside, as the original."""
        F.normalize(x.float(), dim=1, out=out)
        return out.mul_(self.gamma * self.scale)


class StreamedResidual(WanResidualBlock):
    """Norms go straight to where their convolutions read."""

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        """x: [B, C, T, h, w]"""
        out = self.conv1(x, write=self.norm1.write_activated)
        return self.conv2(out, write=self.norm2.write_activated).add_(self.conv_shortcut(x))


class TiledAttention(WanAttentionBlock):
    """Each pixel of a tile attends to those of all tiles, frame by frame."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, T, h, w]"""
        frames = x.transpose(1, 2).flatten(0, 1)  # [B*T, C, h, w]
        query, key_value = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).split([self.dim, 2 * self.dim], 2)
        key, value = self.stream.tile.gather(key_value).chunk(2, dim=2)  # [B*T, H*W, C] each
        attended = F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))
        out = self.proj(attended.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:]))
        return x + out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


CLASSES = {
    WanCausalConv3d: StreamedConv3d,
    WanResample: StreamedResample,
    WanRMS_norm: ScaledNorm,
    WanResidualBlock: StreamedResidual,
    WanAttentionBlock: TiledAttention,
    nn.Conv2d: TiledConv2d,
    nn.ZeroPad2d: TiledPad2d,
}


def streamed(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The VAE, whose modules now stream. Parameters and names stay."""
    for module in vae.modules():
        if type(module) in CLASSES:
            module.__class__ = CLASSES[type(module)]  # as FSDP2 does: nothing is built or copied
        elif isinstance(module, nn.SiLU):
            module.inplace = True  # it always follows a norm, whose result nothing else reads
    return vae


def decoded(vae: AutoencoderKLWan, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
    """The tile's frames [3, t, h', w'] in -1..1 for each frame [C, h, w] of a latent's tile, not normalised."""
    for frames in decoder_output(vae, latent, tile):
        yield unpatched(vae, frames).clamp_(-1, 1)[0]


def decoder_output(vae: AutoencoderKLWan, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
    """The same, before its patches [1, 3 * patch_size**2, t, h, w] become pixels."""
    stream = Stream(tile, frames_format(vae.device.type))
    for index, frame in enumerate(latent):
        yield _decode(vae, frame, stream, first=index == 0)


def encoded(vae: AutoencoderKLWan, video: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
    """The latent tile's frame [C, h, w], not normalised, for each group of frames [3, t, h', w'] in -1..1 of the tile:
    one frame, then FRAMES of them each. It is the mean of what the VAE finds likely."""
    stream = Stream(tile, frames_format(vae.device.type))
    for frames in video:
        yield _encode(vae, frames, stream)


def _decode(vae: AutoencoderKLWan, frame: Tensor, stream: Stream, first: bool) -> Tensor:
    with _seen_by(vae, stream):
        return vae.decoder(vae.post_quant_conv(frame[None, :, None]), first_chunk=first)


def _encode(vae: AutoencoderKLWan, frames: Tensor, stream: Stream) -> Tensor:
    with _seen_by(vae, stream):
        return vae.quant_conv(vae.encoder(_patched(vae, frames.unsqueeze(0))))[0, : vae.config.z_dim, 0]


@contextmanager
def _seen_by(vae: AutoencoderKLWan, stream: Stream):
    """For one pass and no longer: after it a video may be left behind, and the next one begun."""
    parts = [module for module in vae.modules() if type(module) in CLASSES.values()]
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
    """To "decode" or to "encode" a tile of a latent of height x width, beside the weights; what kernels allocate inside
    is not in it. A longer video needs no more."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}  # not where it lies
    return _bytes_needed(json.dumps(config), vae.dtype, work, height, width)


@lru_cache(maxsize=64)
def _bytes_needed(config: str, dtype: torch.dtype, work: str, height: int, width: int) -> int:
    with torch.device("meta"):
        vae = streamed(nn.Module.to(AutoencoderKLWan.from_config(json.loads(config)), dtype))
    tile, pixels = whole(height, width), vae.config.scale_factor_spatial
    sizes = [(vae.config.z_dim, height, width)] * 3  # from the third frame on nothing is new
    if work == "encode":
        sizes = [(3, frames, pixels * height, pixels * width) for frames in (1, FRAMES, FRAMES)]
    given = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    passes = decoded(vae, given, tile) if work == "decode" else encoded(vae, given, tile)
    return most_allocated(lambda: deque(passes, maxlen=1))
