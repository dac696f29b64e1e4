"""A VAE of videos on a rank: what the runtime asks of one, whichever family it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ...parallel.tiles import Place, Tile
from ...specs import VaeForm

Crop = Callable[[Place], Iterable[Tensor]]  # what is at a place of a plane, chunk by chunk


class VideoVae(ABC):
    """network: with diffusers' names of parameters, on this rank's device.

    A latent is worked on in chunks of its frames, in order. A chunk may depend on the earlier ones (a causal VAE keeps
    what it needs of them), and is one frame where the VAE streams, or the whole latent where it does not.
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
        nn.Module.to(self.network, device)  # diffusers' own warns of what does not happen here

    @abstractmethod
    def chunks(self, length: int) -> list[slice]:
        """The chunks of a latent of so many frames."""

    @abstractmethod
    def decoded(self, latent: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
        """Frames [3,t',h',w'] in -1..1 of each chunk [C,t,h,w] of a latent's tile, not normalised.

        All ranks that have a tile of its grid must ask; what lies beyond the tile's edges comes from them.
        """

    @abstractmethod
    def encoded(self, video: Iterable[Tensor], tile: Tile) -> Iterator[Tensor]:
        """Chunks [C,t,h,w] of the tile's latent, not normalised, of the frames [3,t',h',w'] in -1..1 of each: the mean
        of the VAE's distribution."""

    @abstractmethod
    def bytes_needed(self, work: str, frames: int, height: int, width: int) -> int:
        """To "decode" or to "encode" a tile of a latent of this size, besides the weights; without what kernels
        allocate inside."""

    def blend(self) -> BlendedTiles | None:
        """The same in overlapping tiles, for a device with too little memory; None: there is no such way."""
        return None


class BlendedTiles(ABC):
    """A VAE in overlapping tiles, one after the other, which are blended where they overlap."""

    @abstractmethod
    def tiles_of(self, work: str, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """The number of tiles to "decode" or "encode" a latent of height x width, and the size of one in it."""

    @abstractmethod
    def decoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Place, Tensor]]:
        """For each tile its place in pixels, and its frames [3,T',h',w'] in -1..1, fp32, on the CPU.

        height, width: of the latent, whose chunks [C,t,h,w] at a place `crop` gives.
        """

    @abstractmethod
    def encoded(self, height: int, width: int, crop: Crop) -> Iterator[tuple[Place, Tensor]]:
        """For each tile its place in the latent, and that [C,T,h,w], not normalised, fp32, on the CPU.

        height, width: of the video in pixels, whose frames [3,t',h',w'] of each chunk at a place `crop` gives.
        """
