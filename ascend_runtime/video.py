"""A VAE's work, frames to a latent and back: each rank its tile, or one device with little memory tile after tile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from itertools import count

from torch import Tensor

from . import devices
from .families import wan_vae, wan_vae_blended
from .parallel.mesh import highest
from .parallel.tiles import Place, Tile, grid_here, tile_of
from .precision import check_finite, is_finite, not_finite

logger = logging.getLogger(__name__)

OnFrame = Callable[[int, int], None]  # (latent frame 1, 2 ..., of how many); called by all ranks, and may raise on all
Made = Iterator[tuple[tuple[slice, slice, slice], Tensor | None]]  # frames, rows and columns, and what is there
MARGIN = 1.2  # of memory, for what kernels allocate inside
FRAMES = wan_vae.FRAMES


def encode_video(vae, frames: Tensor, latent: Tensor, on_frame: OnFrame) -> None:
    """Encodes frames [T,H,W,3] in 0..1 into latent [1,C,T',H',W'], fp32, on the CPU and not normalised; this rank
    writes its tile.

    It is the mean of what the VAE finds likely, as the original and ComfyUI take it. on_frame: told before each frame
    of a tile.
    """
    way = _way(vae, "encode", *latent.shape[3:])
    _agreed(way.own(frames), "The video to encode")
    tell = _counted(on_frame, latent.shape[2] * way.tiles)
    for where, made in way.encoded(frames, tell):
        if _agreed(made, "The encoded video") is not None:
            latent[0][:, *where] = made


def decode_video(vae, latent: Tensor, frames: Tensor, on_frame: OnFrame) -> None:
    """Decodes latent [B,C,T,H,W], not normalised, into frames [B*T',H',W',3] in 0..1; this rank writes its tile.

    on_frame: told before each frame of a tile.
    """
    check_latent(latent, vae.config.z_dim)
    batch, _, length, *size = latent.shape
    way = _way(vae, "decode", *size)
    tell = _counted(on_frame, batch * length * way.tiles)
    for video, out in zip(latent, frames.unflatten(0, (batch, -1))):
        for where, made in way.decoded(video, tell):
            if _agreed(made, "The decoded video") is not None:
                out[where].copy_(made.movedim(0, -1)).mul_(0.5).add_(0.5)


def check_latent(latent: Tensor, channels: int) -> None:
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise ValueError(
            f"The latent has the shape {list(latent.shape)}; this VAE decodes [B,{channels},T,H,W]. "
            "Wan 2.1 and Wan2.2-A14B latents have 16 channels (the Wan 2.1 VAE), Wan2.2-TI2V-5B's 48 (the Wan 2.2 VAE)."
        )
    check_finite(latent, "The latent")


def _counted(on_frame: OnFrame, total: int) -> Callable[[], None]:
    numbers = count(1)
    return lambda: on_frame(next(numbers), total)


def _agreed(made: Tensor | None, what: str) -> Tensor | None:
    """`made`, if all ranks' are numbers; else all raise ValueError, and none is left in an exchange.

    Looked at by its first axis: of what lies apart, as a tile of frames does, torch makes a copy to look at it.
    """
    if highest(made is not None and not all(map(is_finite, made))):
        raise not_finite(what)
    return made


# Two ways


class _Together:
    """All ranks at once, each its tile, a latent frame after the other. A rank without a tile goes along, as all agree
    after each frame."""

    tiles = 1

    def __init__(self, vae, tile: Tile | None):
        self._vae, self._tile = vae, tile

    def own(self, frames: Tensor) -> Tensor | None:
        """What this rank sees of a video's frames."""
        return None if self._tile is None else frames[:, *self._tile.place(_pixels(self._vae)), :3]

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


class _InTurn:
    """One device, a tile after the other, each with all its frames."""

    def __init__(self, vae, tiles: int):
        self._vae, self.tiles = vae, tiles

    def own(self, frames: Tensor) -> Tensor:
        return frames[..., :3]

    def decoded(self, latent: Tensor, tell: Callable[[], None]) -> Made:
        def crop(place: Place) -> Iterator[Tensor]:
            return (tell() or frame for frame in _latent_frames(self._vae, latent, place))

        for place, made in wan_vae_blended.decoded(self._vae, *latent.shape[2:], crop):
            yield (slice(None), *place), made

    def encoded(self, frames: Tensor, tell: Callable[[], None]) -> Made:
        def crop(place: Place) -> Iterator[Tensor]:
            return (tell() or group for group in _groups(self._vae, frames[:, *place, :3]))

        for place, made in wan_vae_blended.encoded(self._vae, *frames.shape[1:3], crop):
            yield (slice(None), *place), made


def _way(vae, work: str, height: int, width: int) -> _Together | _InTurn:
    """How to "decode" or "encode" a latent of this size in the memory that is free. All ranks must ask.

    Raises ValueError where nothing fits.
    """
    grid, pixels = grid_here(height, width), _pixels(vae)
    needed = MARGIN * wan_vae.bytes_needed(vae, work, max(grid.heights), max(grid.widths))
    free = -highest(-devices.room(vae.device))
    if needed <= free:
        return _Together(vae, tile_of(height, width))
    task = f"To {work} {pixels * width} x {pixels * height} pixels takes {needed / 1e9:.1f} GB"
    if grid.tiles > 1:
        fits = math.sqrt(free / needed)
        raise ValueError(
            f"{task} on each of {grid.tiles} ranks, and {free / 1e9:.1f} GB are free. What would fit: about "
            f"{int(fits * width) * pixels} x {int(fits * height) * pixels} pixels, or "
            f"{math.ceil(grid.tiles * needed / free)} ranks. Ascend Free Memory drops other models' weights."
        )
    tiles, size = wan_vae_blended.tiles_of(vae, work, height, width)
    least = MARGIN * wan_vae.bytes_needed(vae, work, *size)
    if least > free:
        raise ValueError(
            f"{task}, in small tiles {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Ascend Free Memory drops "
            "other models' weights; the VAE in dtype bfloat16 takes half."
        )
    logger.warning("%s, and %.1f GB are free: it is done in small tiles, which are blended.", task, free / 1e9)
    return _InTurn(vae, tiles)


# What a VAE is fed with


def _latent_frames(vae, latent: Tensor, place: Place) -> Iterator[Tensor]:
    """Frames [C,h,w] of what is at a place of a latent [C,T,H,W], on the VAE's device."""
    return (frame[:, *place].to(vae.device, vae.dtype) for frame in latent.unbind(1))


def _groups(vae, frames: Tensor) -> Iterator[Tensor]:
    """The frames [3,t,h,w] in -1..1 of each frame of a latent, of frames [T,h,w,3] in 0..1, on the VAE's device."""
    for index in range(_latent_length(frames)):
        yield frames[_frames_of(index)].to(vae.device, vae.dtype).movedim(-1, 0) * 2 - 1


def _frames_of(index: int) -> slice:
    """The frames that a frame of a latent stands for."""
    return slice(0, 1) if index == 0 else slice(FRAMES * (index - 1) + 1, FRAMES * index + 1)


def _latent_length(frames: Tensor) -> int:
    return (len(frames) - 1) // FRAMES + 1


def _pixels(vae) -> int:
    return vae.config.scale_factor_spatial
