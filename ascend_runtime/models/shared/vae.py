"""The interface of a video VAE of any family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ...parallel.tiles import Area, Tile
from ...specs import VaeForm
from .overlapping import Cut

Crop = Callable[[Area], Iterable[Tensor]]  # an area of a plane -> its content, chunk by chunk


class VideoVae(ABC):
    """network: with diffusers' parameter names, on this rank's device.

    A latent is processed in chunks of frames, in order. A chunk may depend on earlier ones (a causal VAE caches what it
    needs of them). A chunk is one frame if frames enter the VAE one by one, else the whole latent.
    """

    def __init__(self, network: nn.Module, form: VaeForm):
        self.network = network
        self.form = form

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def to(self, device: torch.device | str) -> None:
        nn.Module.to(self.network, device)  # diffusers' own `to` prints warnings that do not apply

    @abstractmethod
    def chunks(self, length: int) -> list[slice]:
        """The chunks of a latent of `length` frames."""

    def steps(self, work: str, length: int) -> list[slice | None]:
        """The steps in which a latent of `length` frames is "decode"d or "encode"d: the chunk that each yields; None
        for a step that yields nothing yet. Between two steps a job can be cancelled."""
        return list(self.chunks(length))

    @abstractmethod
    def decoded(self, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
        """Decodes each chunk [C,t,h,w] of a latent's tile, not normalised, to frames [3,t',h',w'] in -1..1; one item a
        step.

        Collective over the ranks with a tile of its grid, which exchange halos.
        """

    @abstractmethod
    def encoded(self, video: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
        """Encodes the frames [3,t',h',w'] in -1..1 of each chunk to the tile's latent [C,t,h,w], not normalised: the
        mean of the VAE's distribution. One item a step, and collective, like `decoded`."""

    @abstractmethod
    def bytes_needed(self, work: str, frames: int, height: int, width: int, tiles: int = 1) -> int:
        """The bytes needed to "decode" or "encode" a tile of a latent of this size, without the weights and what
        kernels allocate internally. tiles: how many of them make the plane."""

    def cuts(self, frames: int, height: int, width: int) -> tuple[Cut, Cut, Cut] | None:
        """How its authors cut a latent of this size into tiles that overlap in frames, rows and columns; None: they do
        not. Such tiles enter the VAE frame by frame."""
        return None

    def unclipped(self, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor | None]:
        """`decoded` before values beyond -1..1 are clipped, for tiles that `cuts` cuts."""
        return self.decoded(latent, tile)

    def blend(self) -> BlendedTiles | None:
        """The VAE in tiles that overlap in rows and columns, for a device with too little memory; None: not
        supported."""
        return None


class BlendedTiles(ABC):
    """A VAE in overlapping tiles, one after the other, blended where they overlap."""

    @abstractmethod
    def tiles_of(self, work: str, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """(the number of tiles to "decode" or "encode" a latent of height x width, the size of a tile in the latent)"""

    @abstractmethod
    def decoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Area, Tensor]]:
        """For each tile: (its area in pixels, its frames [3,T',h',w'] in -1..1, fp32, on the CPU).

        height, width: of the latent. crop: yields the chunks [C,t,h,w] of an area of it.
        """

    @abstractmethod
    def encoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Area, Tensor]]:
        """For each tile: (its area in the latent, its latent [C,T,h,w], not normalised, fp32, on the CPU).

        height, width: of the video in pixels. crop: yields the frames [3,t',h',w'] of each chunk for an area of it.
        """
