"""How a VAE's work is cut: each rank a tile, or one device with little memory tile after tile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...hardware import devices
from ...parallel.mesh import all_reduce_max
from ...parallel.tiles import Place, Tile, grid_here, tile_of
from .vae import BlendedTiles, VideoVae

logger = logging.getLogger(__name__)

Made = Iterator[tuple[tuple[slice, slice, slice], Tensor | None]]  # frames, rows and columns, and what is there
MARGIN = 1.2  # of memory, for what kernels allocate inside
# Further, on a CPU: of what its ranks keep (hardware.environment.HEAP), not all fits what comes next. Measured: 2.1
# with new ranks, 2.5 with some that had done other work.
HOLES = 2.7


class Together:
    """All ranks at once, each its tile, chunk after chunk. A rank without a tile goes along, as all agree after each
    chunk."""

    in_turn = 1  # tiles that a device works on, one after the other

    def __init__(self, vae: VideoVae, tile: Tile | None, facts: dict[str, str]):
        self._vae, self._tile, self.facts = vae, tile, facts

    def own(self, frames: Tensor) -> Tensor | None:
        """What this rank sees of a video's frames."""
        return None if self._tile is None else _crop(frames, self._tile.place(self._vae.form.spatial))

    def decoded(self, latent: Tensor, on_chunk: Callable[[], None]) -> Made:
        """Of a latent [C,T,H,W], pieces of frames [3,t,h,w] in -1..1."""
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else vae.decoded(_latent_chunks(vae, latent, tile.place()), tile)
        place = (slice(0), slice(0)) if tile is None else tile.place(vae.form.spatial)
        for chunk in vae.chunks(latent.shape[1]):
            on_chunk()
            yield (_frames_of(vae, chunk), *place), next(made, None)

    def encoded(self, frames: Tensor, on_chunk: Callable[[], None]) -> Made:
        """Of frames [T,H,W,3] in 0..1, pieces of a latent [C,t,h,w]."""
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else vae.encoded(_frame_chunks(vae, self.own(frames)), tile)
        place = (slice(0), slice(0)) if tile is None else tile.place()
        for chunk in vae.chunks(_latent_length(vae, frames)):
            on_chunk()
            yield (chunk, *place), next(made, None)


class InTurn:
    """One device, a tile after the other, each with all its frames."""

    def __init__(self, vae: VideoVae, blended: BlendedTiles, tiles: int, facts: dict[str, str]):
        self._vae, self._blended, self.in_turn, self.facts = vae, blended, tiles, facts

    def own(self, frames: Tensor) -> Tensor:
        return frames[..., :3]

    def decoded(self, latent: Tensor, on_chunk: Callable[[], None]) -> Made:
        def crop(place: Place) -> Iterator[Tensor]:
            return (on_chunk() or chunk for chunk in _latent_chunks(self._vae, latent, place))

        for place, made in self._blended.decoded(*latent.shape[2:], crop):
            yield (slice(None), *place), made

    def encoded(self, frames: Tensor, on_chunk: Callable[[], None]) -> Made:
        def crop(place: Place) -> Iterator[Tensor]:
            return (on_chunk() or chunk for chunk in _frame_chunks(self._vae, _crop(frames, place)))

        for place, made in self._blended.encoded(*frames.shape[1:3], crop):
            yield (slice(None), *place), made


def tiling_for(vae: VideoVae, work: str, frames: int, height: int, width: int) -> Together | InTurn:
    """How to "decode" or "encode" a latent of this size in the memory that is free. All ranks must ask.

    Raises ValueError where nothing fits.
    """
    grid, pixels, spare = grid_here(height, width), vae.form.spatial, margin(vae.device)
    needed = spare * vae.bytes_needed(work, frames, max(grid.heights), max(grid.widths))
    free = -all_reduce_max(-devices.room(vae.device))
    if needed <= free:
        facts = {"tiles": f"{len(grid.heights)} x {len(grid.widths)}", "memory": f"{needed / 1e9:.1f} GB a rank"}
        return Together(vae, tile_of(height, width), facts)
    task = f"To {work} {pixels * width} x {pixels * height} pixels takes {needed / 1e9:.1f} GB"
    if grid.tiles > 1 or (blended := vae.blend()) is None:
        free = max(free, 1)
        sides = (max(1, int(math.sqrt(free / needed) * side)) * pixels for side in (width, height))
        on_cards = "" if vae.device.type == "cpu" else f", or {math.ceil(grid.tiles * needed / free)} ranks"
        on_each = f" on each of {grid.tiles} ranks" if grid.tiles > 1 else ""
        raise ValueError(
            f"{task}{on_each}, and {free / 1e9:.1f} GB are free. What would fit: about "
            f"{' x '.join(map(str, sides))} pixels{on_cards}. Ascend Free Memory drops other models' weights."
        )
    tiles, size = blended.tiles_of(work, height, width)
    least = spare * vae.bytes_needed(work, frames, *size)
    if least > free:
        half = "; the VAE in dtype bfloat16 takes half" if vae.dtype == torch.float32 else ""
        raise ValueError(
            f"{task}, in small tiles {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Ascend Free Memory drops "
            f"other models' weights{half}."
        )
    logger.warning("%s, and %.1f GB are free: it is done in small tiles, which are blended.", task, free / 1e9)
    return InTurn(vae, blended, tiles, {"tiles": f"{tiles} in turn", "memory": f"{least / 1e9:.1f} GB"})


def margin(device: torch.device) -> float:
    """What a device needs for each byte of the tensors that `VideoVae.bytes_needed` counts."""
    return MARGIN * HOLES if device.type == "cpu" else MARGIN


# What a VAE is fed with


def _crop(frames: Tensor, place: Place) -> Tensor:
    """What is at a place of frames [T,H,W,C], without alpha: a view."""
    return frames[(slice(None), *place)][..., :3]


def _latent_chunks(vae: VideoVae, latent: Tensor, place: Place) -> Iterator[Tensor]:
    """Chunks [C,t,h,w] of what is at a place of a latent [C,T,H,W], on the VAE's device."""
    for chunk in vae.chunks(latent.shape[1]):
        yield latent[(slice(None), chunk, *place)].to(vae.device, vae.dtype)


def _frame_chunks(vae: VideoVae, frames: Tensor) -> Iterator[Tensor]:
    """The frames [3,t,h,w] in -1..1 of each chunk of a latent, of frames [T,h,w,3] in 0..1, on the VAE's device."""
    for chunk in vae.chunks(_latent_length(vae, frames)):
        group = frames[_frames_of(vae, chunk)].to(vae.device).float().movedim(-1, 0)
        yield (group * 2 - 1).to(vae.dtype)  # rounded after, not before it is made twice as large


def _frames_of(vae: VideoVae, chunk: slice) -> slice:
    """The frames that some frames of a latent stand for: the first stands for one, the others for several each."""
    temporal = vae.form.temporal
    start = temporal * (chunk.start - 1) + 1 if chunk.start else 0
    return slice(start, temporal * (chunk.stop - 1) + 1)


def _latent_length(vae: VideoVae, frames: Tensor) -> int:
    return (len(frames) - 1) // vae.form.temporal + 1
