"""Runs a VAE in tiles: one tile on each rank, or one tile after the other on a device with little memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...hardware import devices
from ...parallel.mesh import all_reduce_max
from ...parallel.tiles import Area, Tile, grid_here, tile_of
from .vae import BlendedTiles, VideoVae

logger = logging.getLogger(__name__)

OutputPieces = Iterator[tuple[tuple[slice, slice, slice], Tensor | None]]  # ((frames, rows, columns), their content)
KERNEL_MARGIN = 1.2  # a factor for what kernels allocate internally
# A further factor on a CPU, for heap fragmentation (hardware.environment.HEAP). Measured: 2.1 with new ranks, 2.5 after
# other jobs.
CPU_HEAP_MARGIN = 2.7


class TilePerRank:
    """One tile on each rank, chunk by chunk. A rank without a tile takes part too, as all ranks agree after each chunk
    whether to continue."""

    in_turn = 1  # the number of tiles that a device processes one after the other

    def __init__(self, vae: VideoVae, tile: Tile | None, facts: dict[str, str]):
        self._vae, self._tile, self.facts = vae, tile, facts

    def own(self, frames: Tensor) -> Tensor | None:
        """The part of a video's frames that this rank reads."""
        return None if self._tile is None else _crop(frames, self._tile.place(self._vae.form.spatial))

    def decoded(self, latent: Tensor, on_chunk: Callable[[], None]) -> OutputPieces:
        """Decodes a latent [C,T,H,W] to pieces of frames [3,t,h,w] in -1..1."""
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else vae.decoded(_latent_chunks(vae, latent, tile.place()), tile)
        area = (slice(0), slice(0)) if tile is None else tile.place(vae.form.spatial)
        for chunk in vae.chunks(latent.shape[1]):
            on_chunk()
            yield (_frames_of(vae, chunk), *area), next(made, None)

    def encoded(self, frames: Tensor, on_chunk: Callable[[], None]) -> OutputPieces:
        """Encodes frames [T,H,W,3] in 0..1 to pieces of a latent [C,t,h,w]."""
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else vae.encoded(_frame_chunks(vae, self.own(frames)), tile)
        area = (slice(0), slice(0)) if tile is None else tile.place()
        for chunk in vae.chunks(_latent_length(vae, frames)):
            on_chunk()
            yield (chunk, *area), next(made, None)


class TilesInTurn:
    """One tile after the other on one device, each with all its frames."""

    def __init__(self, vae: VideoVae, blended: BlendedTiles, tiles: int, facts: dict[str, str]):
        self._vae, self._blended, self.in_turn, self.facts = vae, blended, tiles, facts

    def own(self, frames: Tensor) -> Tensor:
        return frames[..., :3]

    def decoded(self, latent: Tensor, on_chunk: Callable[[], None]) -> OutputPieces:
        def crop(area: Area) -> Iterator[Tensor]:
            return (on_chunk() or chunk for chunk in _latent_chunks(self._vae, latent, area))

        for area, made in self._blended.decoded(*latent.shape[2:], crop):
            yield (slice(None), *area), made

    def encoded(self, frames: Tensor, on_chunk: Callable[[], None]) -> OutputPieces:
        def crop(area: Area) -> Iterator[Tensor]:
            return (on_chunk() or chunk for chunk in _frame_chunks(self._vae, _crop(frames, area)))

        for area, made in self._blended.encoded(*frames.shape[1:3], crop):
            yield (slice(None), *area), made


def tiling_for(vae: VideoVae, work: str, frames: int, height: int, width: int) -> TilePerRank | TilesInTurn:
    """How to "decode" or "encode" a latent of this size in free memory. Collective: all ranks must call it.

    Raises ValueError if no way fits.
    """
    grid, pixels, spare = grid_here(height, width), vae.form.spatial, margin(vae.device)
    needed = spare * vae.bytes_needed(work, frames, max(grid.heights), max(grid.widths))
    free = -all_reduce_max(-devices.room(vae.device))
    if needed <= free:
        facts = {"tiles": f"{len(grid.heights)} x {len(grid.widths)}", "memory": f"{needed / 1e9:.1f} GB a rank"}
        return TilePerRank(vae, tile_of(height, width), facts)
    task = f"To {work} {pixels * width} x {pixels * height} pixels takes {needed / 1e9:.1f} GB"
    if grid.tiles > 1 or (blended := vae.blend()) is None:
        free = max(free, 1)
        sides = (max(1, int(math.sqrt(free / needed) * side)) * pixels for side in (width, height))
        on_cards = "" if vae.device.type == "cpu" else f", or {math.ceil(grid.tiles * needed / free)} ranks"
        on_each = f" on each of {grid.tiles} ranks" if grid.tiles > 1 else ""
        raise ValueError(
            f"{task}{on_each}, but {free / 1e9:.1f} GB are free. Use about {' x '.join(map(str, sides))} "
            f"pixels{on_cards}. Ascend Free Memory frees other models' weights."
        )
    tiles, size = blended.tiles_of(work, height, width)
    least = spare * vae.bytes_needed(work, frames, *size)
    if least > free:
        half = "; the VAE in dtype bfloat16 takes half" if vae.dtype == torch.float32 else ""
        raise ValueError(
            f"{task}, in small tiles {least / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Ascend Free Memory frees "
            f"other models' weights{half}."
        )
    logger.warning("%s, but %.1f GB are free: small tiles are used, and blended.", task, free / 1e9)
    return TilesInTurn(vae, blended, tiles, {"tiles": f"{tiles} in turn", "memory": f"{least / 1e9:.1f} GB"})


def margin(device: torch.device) -> float:
    """The memory that a device needs for each byte that `VideoVae.bytes_needed` counts."""
    return KERNEL_MARGIN * CPU_HEAP_MARGIN if device.type == "cpu" else KERNEL_MARGIN


# A VAE's inputs


def _crop(frames: Tensor, area: Area) -> Tensor:
    """A view of an area of frames [T,H,W,C], without alpha."""
    return frames[(slice(None), *area)][..., :3]


def _latent_chunks(vae: VideoVae, latent: Tensor, area: Area) -> Iterator[Tensor]:
    """Chunks [C,t,h,w] of an area of a latent [C,T,H,W], which is copied to the VAE's device once."""
    here = latent[(slice(None), slice(None), *area)].to(vae.device, vae.dtype)
    for chunk in vae.chunks(latent.shape[1]):
        yield here[:, chunk]


def _frame_chunks(vae: VideoVae, frames: Tensor) -> Iterator[Tensor]:
    """The frames [3,t,h,w] in -1..1 of each latent chunk, from frames [T,h,w,3] in 0..1, on the VAE's device."""
    for chunk in vae.chunks(_latent_length(vae, frames)):
        group = frames[_frames_of(vae, chunk)].to(vae.device).float().movedim(-1, 0)
        yield (group * 2 - 1).to(vae.dtype)  # rounded after scaling


def _frames_of(vae: VideoVae, chunk: slice) -> slice:
    """The video frames of a latent chunk: one for the first latent frame, `form.temporal` for each other one."""
    temporal = vae.form.temporal
    start = temporal * (chunk.start - 1) + 1 if chunk.start else 0
    return slice(start, temporal * (chunk.stop - 1) + 1)


def _latent_length(vae: VideoVae, frames: Tensor) -> int:
    return (len(frames) - 1) // vae.form.temporal + 1
