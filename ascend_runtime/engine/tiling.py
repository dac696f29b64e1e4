"""How a VAE's work is cut: each rank a tile, or one device with little memory tile after tile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..hardware import devices
from ..models.wan import vae as wan_vae
from ..models.wan import vae_blended as wan_vae_blended
from ..models.wan.vae import FRAMES
from ..parallel.mesh import highest
from ..parallel.tiles import Place, Tile, grid_here, tile_of

logger = logging.getLogger(__name__)

Made = Iterator[tuple[tuple[slice, slice, slice], Tensor | None]]  # frames, rows and columns, and what is there
MARGIN = 1.2  # of memory, for what kernels allocate inside
# Besides, on a CPU: of what its ranks keep (environment.HEAP), not all fits what comes next. Measured: 2.1 with new
# ranks, 2.5 with some that had done other work.
HOLES = 2.7


class Together:
    """All ranks at once, each its tile, a latent frame after the other. A rank without a tile goes along, as all agree
    after each frame."""

    in_turn = 1  # tiles that a device works on, one after the other

    def __init__(self, vae, tile: Tile | None, facts: dict[str, str]):
        self._vae, self._tile, self.facts = vae, tile, facts

    def own(self, frames: Tensor) -> Tensor | None:
        """What this rank sees of a video's frames."""
        return None if self._tile is None else _crop(frames, self._tile.place(_pixels(self._vae)))

    def decoded(self, latent: Tensor, tell: Callable[[], None]) -> Made:
        """Of a latent [C,T,H,W], pieces of frames [3,t,h,w] in -1..1."""
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else wan_vae.decoded(vae, _latent_frames(vae, latent, tile.place()), tile)
        place = (slice(0), slice(0)) if tile is None else tile.place(_pixels(vae))
        for index in range(latent.shape[1]):
            tell()
            yield (_frames_of(index), *place), next(made, None)

    def encoded(self, frames: Tensor, tell: Callable[[], None]) -> Made:
        """Of frames [T,H,W,3] in 0..1, pieces of a latent [C,1,h,w]."""
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else wan_vae.encoded(vae, _groups(vae, self.own(frames)), tile)
        place = (slice(0), slice(0)) if tile is None else tile.place()
        for index in range(_latent_length(frames)):
            tell()
            latent = next(made, None)
            yield (slice(index, index + 1), *place), latent if latent is None else latent.unsqueeze(1)


class InTurn:
    """One device, a tile after the other, each with all its frames."""

    def __init__(self, vae, tiles: int, facts: dict[str, str]):
        self._vae, self.in_turn, self.facts = vae, tiles, facts

    def own(self, frames: Tensor) -> Tensor:
        return frames[..., :3]

    def decoded(self, latent: Tensor, tell: Callable[[], None]) -> Made:
        def crop(place: Place) -> Iterator[Tensor]:
            return (tell() or frame for frame in _latent_frames(self._vae, latent, place))

        for place, made in wan_vae_blended.decoded(self._vae, *latent.shape[2:], crop):
            yield (slice(None), *place), made

    def encoded(self, frames: Tensor, tell: Callable[[], None]) -> Made:
        def crop(place: Place) -> Iterator[Tensor]:
            return (tell() or group for group in _groups(self._vae, _crop(frames, place)))

        for place, made in wan_vae_blended.encoded(self._vae, *frames.shape[1:3], crop):
            yield (slice(None), *place), made


def tiling_for(vae, work: str, height: int, width: int) -> Together | InTurn:
    """How to "decode" or "encode" a latent of this size in the memory that is free. All ranks must ask.

    Raises ValueError where nothing fits.
    """
    grid, pixels, spare = grid_here(height, width), _pixels(vae), margin(vae.device)
    needed = spare * wan_vae.bytes_needed(vae, work, max(grid.heights), max(grid.widths))
    free = -highest(-devices.room(vae.device))
    if needed <= free:
        facts = {"tiles": f"{len(grid.heights)} x {len(grid.widths)}", "memory": f"{needed / 1e9:.1f} GB a rank"}
        return Together(vae, tile_of(height, width), facts)
    task = f"To {work} {pixels * width} x {pixels * height} pixels takes {needed / 1e9:.1f} GB"
    if grid.tiles > 1:
        free = max(free, 1)
        sides = (max(1, int(math.sqrt(free / needed) * side)) * pixels for side in (width, height))
        on_cards = "" if vae.device.type == "cpu" else f", or {math.ceil(grid.tiles * needed / free)} ranks"
        raise ValueError(
            f"{task} on each of {grid.tiles} ranks, and {free / 1e9:.1f} GB are free. What would fit: about "
            f"{' x '.join(map(str, sides))} pixels{on_cards}. Ascend Free Memory drops other models' weights."
        )
    tiles, size = wan_vae_blended.tiles_of(vae, work, height, width)
    least = spare * wan_vae.bytes_needed(vae, work, *size)
    if least > free:
        half = "; the VAE in dtype bfloat16 takes half" if vae.dtype == torch.float32 else ""
        raise ValueError(
            f"{task}, in small tiles {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Ascend Free Memory drops "
            f"other models' weights{half}."
        )
    logger.warning("%s, and %.1f GB are free: it is done in small tiles, which are blended.", task, free / 1e9)
    return InTurn(vae, tiles, {"tiles": f"{tiles} in turn", "memory": f"{least / 1e9:.1f} GB"})


def margin(device: torch.device) -> float:
    """What a device needs for each byte of the tensors that `wan_vae.bytes_needed` tells of."""
    return MARGIN * HOLES if device.type == "cpu" else MARGIN


def check_host_holds(frames: Tensor) -> None:
    """Raises ValueError, on all ranks alike, where frames [T,H,W,3] that nobody has written to yet would not fit into
    the host's memory: the kernel would end some process for it."""
    free = -highest(-devices.host_memory())
    if frames.nbytes > free:
        number, height, width, _ = frames.shape
        raise ValueError(
            f"The decoded video, {number} frames of {width} x {height} pixels, takes {frames.nbytes / 1e9:.1f} GB of "
            f"the host's memory, and {free / 1e9:.1f} GB are free. What would fit: {free * number // frames.nbytes} "
            "frames of this size."
        )


# What a VAE is fed with


def _crop(frames: Tensor, place: Place) -> Tensor:
    """What is at a place of frames [T,H,W,C], without alpha: a view."""
    return frames[(slice(None), *place)][..., :3]


def _latent_frames(vae, latent: Tensor, place: Place) -> Iterator[Tensor]:
    """Frames [C,h,w] of what is at a place of a latent [C,T,H,W], on the VAE's device."""
    return (frame[(slice(None), *place)].to(vae.device, vae.dtype) for frame in latent.unbind(1))


def _groups(vae, frames: Tensor) -> Iterator[Tensor]:
    """The frames [3,t,h,w] in -1..1 of each frame of a latent, of frames [T,h,w,3] in 0..1, on the VAE's device."""
    for index in range(_latent_length(frames)):
        group = frames[_frames_of(index)].to(vae.device).float().movedim(-1, 0)
        yield (group * 2 - 1).to(vae.dtype)  # rounded after, not before it is made twice as large


def _frames_of(index: int) -> slice:
    """The frames that a frame of a latent stands for."""
    return slice(0, 1) if index == 0 else slice(FRAMES * (index - 1) + 1, FRAMES * index + 1)


def _latent_length(frames: Tensor) -> int:
    return (len(frames) - 1) // FRAMES + 1


def _pixels(vae) -> int:
    return vae.config.scale_factor_spatial
