"""The Wan VAE behind the `VideoVae` interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from diffusers import AutoencoderKLWan
from torch import Tensor

from ....parallel.tiles import Tile
from ....specs import VaeForm
from ...shared.vae import BlendedTiles, VideoVae
from . import streamed
from .blended import WanBlendedTiles


class WanVae(VideoVae):
    """Streams by latent frame. Padding is zeros and norms are per pixel, so tiles exchange only halos, and keys and
    values of the attention."""

    def __init__(self, network: AutoencoderKLWan, form: VaeForm):
        super().__init__(streamed.streamed(network), form)

    def chunks(self, length: int) -> list[slice]:
        return [slice(index, index + 1) for index in range(length)]

    def decoded(self, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
        return streamed.decoded(self.network, (frame.squeeze(1) for frame in latent), tile)

    def encoded(self, video: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
        return (frame.unsqueeze(1) for frame in streamed.encoded(self.network, video, tile))

    def bytes_needed(self, work: str, frames: int, height: int, width: int, tiles: int = 1) -> int:
        """Does not depend on `frames`, nor much on `tiles`: keys and values are of one latent frame."""
        return streamed.bytes_needed(self.network, work, height, width)

    def blend(self) -> BlendedTiles:
        return WanBlendedTiles(self.network)
