"""The Wan VAE in overlapping tiles, one after the other, for a device with too little memory for whole frames.

Tiles are padded with zeros, and blended where they overlap. Tile sizes and the order of blending are those of
diffusers' tiled AutoencoderKLWan, and so is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ....parallel.tiles import Area, Tile, single_tile
from ...shared.vae import BlendedTiles, Crop
from . import streamed

SIZE, STRIDE = 256, 192  # of tiles, in pixels


@dataclass(frozen=True)
class Blend:
    """Tiles of `size` pixels at a stride, of an input plane; the output plane has `made` pixels for each `taken`
    ones."""

    size: int
    stride: int
    made: int = 1
    taken: int = 1

    def tiles(self, height: int, width: int) -> int:
        return len(range(0, height, self.stride)) * len(range(0, width, self.stride))

    def run(self, height: int, width: int, make: Callable[[Area], Tensor]) -> Iterator[tuple[Area, Tensor]]:
        """For each tile: (its area in the output, the output there [..., h, w], valid until the next tile).

        make: computes the output of an area of the input, as a tensor that may be modified. Holds two rows of tiles.
        """
        stride, overlap = self._made(self.stride), self._made(self.size) - self._made(self.stride)
        above: list[Tensor] = []
        for top in range(0, height, self.stride):
            row: list[Tensor] = []
            for left in range(0, width, self.stride):
                tile = make((slice(top, min(top + self.size, height)), slice(left, min(left + self.size, width))))
                if above:
                    _fade(above[len(row)], tile, -2, overlap)
                if row:
                    _fade(row[-1], tile, -1, overlap)
                row.append(tile)
                kept, y, x = tile[..., :stride, :stride], self._made(top), self._made(left)
                yield (slice(y, y + kept.shape[-2]), slice(x, x + kept.shape[-1])), kept
            above = row

    def _made(self, pixels: int) -> int:
        return pixels * self.made // self.taken


def _fade(before: Tensor, after: Tensor, dim: int, overlap: int) -> None:
    """Blends the first pixels of `after` along `dim` linearly with the last ones of `before`, in place."""
    overlap = min(before.shape[dim], after.shape[dim], overlap)
    ending, beginning = before.narrow(dim, before.shape[dim] - overlap, overlap), after.narrow(dim, 0, overlap)
    own = torch.arange(overlap, dtype=after.dtype) / overlap
    beginning.lerp_(ending, 1 - (own if dim == -1 else own.unsqueeze(-1)))


def tiles_of(vae: AutoencoderKLWan, work: str, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """(the number of tiles to "decode" or "encode" a latent of height x width, the size of a tile in the latent)"""
    patches = 1 if work == "decode" else vae.config.scale_factor_spatial // (vae.config.patch_size or 1)
    blend = _blend(vae, work)
    size = blend.size // patches
    return blend.tiles(patches * height, patches * width), (min(size, height), min(size, width))


def _blend(vae: AutoencoderKLWan, work: str) -> Blend:
    """The tiles of the latent for "decode", of the patches of frames for "encode"; the output is the other plane."""
    pixels, patch = vae.config.scale_factor_spatial, vae.config.patch_size or 1
    if work == "decode":
        return Blend(SIZE // pixels, STRIDE // pixels, made=pixels // patch)
    return Blend(SIZE, STRIDE, taken=pixels // patch)


def decode_blended(vae: AutoencoderKLWan, height: int, width: int, crop: Crop) -> Iterator[tuple[Area, Tensor]]:
    """For each tile: (its area in pixels, its frames [3, T', h', w'] in -1..1, fp32, on the CPU).

    height, width: of the latent. crop: yields the latent frames [C, h, w] of an area of it.
    """

    def make(area: Area) -> Tensor:
        return torch.cat([x.float().cpu() for x in streamed.decoder_output(vae, crop(area), _whole_tile(area))], dim=2)

    for area, made in _blend(vae, "decode").run(height, width, make):
        yield _scaled(area, vae.config.patch_size or 1), streamed.unpatched(vae, made).clamp(-1, 1)[0]


def encode_blended(vae: AutoencoderKLWan, height: int, width: int, crop: Crop) -> Iterator[tuple[Area, Tensor]]:
    """For each tile: (its area in the latent, its latent [C, T', h', w'], not normalised, fp32, on the CPU).

    height, width: of the video in pixels. crop: yields groups of frames [3, t, h, w] in -1..1 of an area of it.
    """
    patch = vae.config.patch_size or 1

    def make(area: Area) -> Tensor:
        frames = streamed.encoded(vae, crop(_scaled(area, patch)), _whole_tile(area))
        return torch.stack([x.float().cpu() for x in frames], dim=1)

    yield from _blend(vae, "encode").run(height // patch, width // patch, make)


def _whole_tile(area: Area) -> Tile:
    """A tile without neighbours."""
    rows, columns = area
    return single_tile(rows.stop - rows.start, columns.stop - columns.start)


def _scaled(area: Area, scale: int) -> Area:
    rows, columns = (slice(side.start * scale, side.stop * scale) for side in area)
    return rows, columns


class WanBlendedTiles(BlendedTiles):
    def __init__(self, network: AutoencoderKLWan):
        self._network = network

    def tiles_of(self, work: str, height: int, width: int) -> tuple[int, tuple[int, int]]:
        return tiles_of(self._network, work, height, width)

    def decoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Area, Tensor]]:
        return decode_blended(self._network, height, width, lambda area: (frame.squeeze(1) for frame in crop(area)))

    def encoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Area, Tensor]]:
        return encode_blended(self._network, height, width, crop)
