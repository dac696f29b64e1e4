"""The Wan VAE in overlapping tiles, one after the other, for a device with too little memory for the whole.

Tiles see nothing beyond their edge; where they overlap, one fades into the next. Sizes and the order of fading are
those of diffusers' tiled AutoencoderKLWan, whose result this is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ....parallel.tiles import Place, Tile, whole
from ...shared.vae import BlendedTiles, Crop
from . import streamed as wan_vae

SIZE, STRIDE = 256, 192  # pixels of a tile, and from one to the next


@dataclass(frozen=True)
class Blend:
    """Tiles of `size` pixels, `stride` apart, of a plane of which another one is made: `made` pixels of `taken`."""

    size: int
    stride: int
    made: int = 1
    taken: int = 1

    def tiles(self, height: int, width: int) -> int:
        return len(range(0, height, self.stride)) * len(range(0, width, self.stride))

    def run(self, height: int, width: int, make: Callable[[Place], Tensor]) -> Iterator[tuple[Place, Tensor]]:
        """For each tile its place in what is made, and what is there [..., h, w]; to be read before the next is taken.

        make: what the tile at a place of the plane becomes, a tensor that nobody else writes to. Two rows of tiles are
        held.
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
    """The first pixels of `after` along `dim`: from the last ones of `before` to its own, in even steps."""
    overlap = min(before.shape[dim], after.shape[dim], overlap)
    ending, beginning = before.narrow(dim, before.shape[dim] - overlap, overlap), after.narrow(dim, 0, overlap)
    own = torch.arange(overlap, dtype=after.dtype) / overlap
    beginning.lerp_(ending, 1 - (own if dim == -1 else own.unsqueeze(-1)))


def tiles_of(vae: AutoencoderKLWan, work: str, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """How many tiles it takes to "decode" or to "encode" a latent of height x width, and the size of one in it."""
    patches = 1 if work == "decode" else vae.config.scale_factor_spatial // (vae.config.patch_size or 1)
    blend = _blend(vae, work)
    size = blend.size // patches
    return blend.tiles(patches * height, patches * width), (min(size, height), min(size, width))


def _blend(vae: AutoencoderKLWan, work: str) -> Blend:
    """That of a latent's plane to "decode", and of a plane of patches to "encode"; what is made is the other one."""
    pixels, patch = vae.config.scale_factor_spatial, vae.config.patch_size or 1
    if work == "decode":
        return Blend(SIZE // pixels, STRIDE // pixels, made=pixels // patch)
    return Blend(SIZE, STRIDE, taken=pixels // patch)


def decoded(vae: AutoencoderKLWan, height: int, width: int, crop: Crop) -> Iterator[tuple[Place, Tensor]]:
    """For each tile its place in pixels, and its frames [3, T', h', w'] in -1..1, fp32, on the CPU.

    height, width: of the latent, whose frames [C, h, w] at a place `crop` gives.
    """

    def make(place: Place) -> Tensor:
        return torch.cat([x.float().cpu() for x in wan_vae.decoder_output(vae, crop(place), _alone(place))], dim=2)

    for place, made in _blend(vae, "decode").run(height, width, make):
        yield _scaled(place, vae.config.patch_size or 1), wan_vae.unpatched(vae, made).clamp(-1, 1)[0]


def encoded(vae: AutoencoderKLWan, height: int, width: int, crop: Crop) -> Iterator[tuple[Place, Tensor]]:
    """For each tile its place in the latent, and that [C, T', h', w'], not normalised, fp32, on the CPU.

    height, width: of the video in pixels, whose groups of frames [3, t, h, w] in -1..1 at a place `crop` gives.
    """
    patch = vae.config.patch_size or 1

    def make(place: Place) -> Tensor:
        frames = wan_vae.encoded(vae, crop(_scaled(place, patch)), _alone(place))
        return torch.stack([x.float().cpu() for x in frames], dim=1)

    yield from _blend(vae, "encode").run(height // patch, width // patch, make)


def _alone(place: Place) -> Tile:
    """A tile without neighbours."""
    rows, columns = place
    return whole(rows.stop - rows.start, columns.stop - columns.start)


def _scaled(place: Place, scale: int) -> Place:
    rows, columns = (slice(side.start * scale, side.stop * scale) for side in place)
    return rows, columns


class WanBlendedTiles(BlendedTiles):
    def __init__(self, network: AutoencoderKLWan):
        self._network = network

    def tiles_of(self, work: str, height: int, width: int) -> tuple[int, tuple[int, int]]:
        return tiles_of(self._network, work, height, width)

    def decoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Place, Tensor]]:
        return decoded(self._network, height, width, lambda place: (frame.squeeze(1) for frame in crop(place)))

    def encoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Place, Tensor]]:
        return encoded(self._network, height, width, crop)
