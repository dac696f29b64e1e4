"""The HunyuanVideo VAE behind the `VideoVae` interface."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from ....ops.memory import most_allocated
from ....parallel.tiles import Tile, TileGrid
from ....specs import VaeForm
from ...shared.overlapping import Cut
from ...shared.vae import VideoVae
from . import layers

# The published tiles, in the latent: 256 x 256 pixels and 64 frames with 25 % overlap, and one frame before the 64 that
# is not used (Tencent/HunyuanVideo, hyvideo/vae/autoencoder_kl_causal_3d.py). Equal to diffusers' with
# `enable_tiling(256, 256, 64, 192, 192, 48)`; its default is tiles of 16 frames.
TIME, SPACE = Cut(17, 12, dropped=1), Cut(32, 24)
LONGEST = 16  # frames of a latent that is not cut in time
FEW_FRAMES, FEW_TILES = 5, 16


class HunyuanVae(VideoVae):
    """All frames pass a layer before the next one, as its norms span them. Tiles of a plane exchange halos, the
    statistics of norms, and keys and values of the attention."""

    network: AutoencoderKLHunyuanVideo

    def chunks(self, length: int) -> list[slice]:
        return [slice(index, index + 1) for index in range(length)]

    def steps(self, work: str, length: int) -> list[slice | None]:
        passes = layers.passes_of(self.network.decoder if work == "decode" else self.network.encoder)
        return [None] * passes + self.chunks(length)

    def decoded(self, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
        for made in self.unclipped(latent, tile):
            yield None if made is None else made.clamp_(-1, 1)

    def unclipped(self, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
        return layers.decoded(self.network, latent, tile)

    def encoded(self, video: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
        return layers.encoded(self.network, video, tile)

    def cuts(self, frames: int, height: int, width: int) -> tuple[Cut, Cut, Cut]:
        """Rows and columns are cut if either are more than a tile's."""
        plane = (Cut(height, height), Cut(width, width)) if max(height, width) <= SPACE.size else (SPACE, SPACE)
        return (TIME if frames > LONGEST else Cut(frames, frames)), *plane

    def bytes_needed(self, work: str, frames: int, height: int, width: int, tiles: int = 1) -> int:
        """Each further frame takes as much as the last: a few frames are enough, as a dry run of 129 takes seconds.
        (Not so where keys and values of many tiles may come to take the most.)"""
        config = {name: value for name, value in self.network.config.items() if not name.startswith("_")}

        def needed(length: int) -> int:
            size = length, height, width
            return _bytes_needed(json.dumps(config), self.form, self.dtype, work, size, tiles)

        if frames <= FEW_FRAMES or tiles > FEW_TILES:
            return needed(frames)
        few = needed(FEW_FRAMES)
        return few + (frames - FEW_FRAMES) * (few - needed(FEW_FRAMES - 1))


@dataclass(frozen=True)
class PredictedTile(Tile):
    """A tile on the meta device, one of `tiles` equal ones. Exchanges nothing, and takes the memory of what it would
    receive."""

    tiles: int = 1

    def gather(self, tokens: Tensor) -> Tensor:
        return tokens.new_empty(tokens.shape[0], self.tiles * tokens.shape[1], tokens.shape[2])


@lru_cache(maxsize=64)
def _bytes_needed(
    config: str, form: VaeForm, dtype: torch.dtype, work: str, size: tuple[int, int, int], tiles: int
) -> int:
    with torch.device("meta"):
        network = AutoencoderKLHunyuanVideo.from_config(json.loads(config))
    vae, (frames, height, width) = HunyuanVae(nn.Module.to(network, dtype), form), size
    tile = PredictedTile(TileGrid((height,), (width,)), 0, tiles=tiles)
    shapes = [(form.channels, 1, height, width)] * frames
    if work == "encode":
        lengths = [1] + [form.temporal] * (frames - 1)
        shapes = [(3, length, form.spatial * height, form.spatial * width) for length in lengths]
    given = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    passes = vae.decoded(given, tile) if work == "decode" else vae.encoded(given, tile)
    return most_allocated(lambda: deque(passes, maxlen=1))
