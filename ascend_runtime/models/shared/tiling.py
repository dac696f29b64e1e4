"""Runs a VAE in tiles: one tile on each rank; or tiles that overlap, dealt to the ranks or one after the other on a
device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import coded_error
from ...hardware import devices
from ...parallel.machines import add_machines, machines
from ...parallel.mesh import all_reduce_max, this_rank, world_size
from ...parallel.tiles import Area, Tile, TileGrid, grid_here, single_tile, tile_of
from . import overlapping
from .overlapping import LatentTile, additions
from .vae import BlendedTiles, VideoVae

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A part of a video's output. where: its frames, rows and columns. content [C,t,h,w]: None if this rank has none.
    weights [t,h,w]: factors that make the content one term of a sum; None: it is all of the output there."""

    where: tuple[slice, slice, slice]
    content: Tensor | None
    weights: Tensor | None = None


Pieces = Iterator[Piece]
KERNEL_MARGIN = 1.2  # a factor for what kernels allocate internally
# A further factor on a CPU, for heap fragmentation (hardware.environment.HEAP). Measured: 2.1 with new ranks, 2.5 after
# other jobs.
CPU_HEAP_MARGIN = 2.7


OnStep = Callable[[], None]  # called before each step; may raise on all ranks


class Tiling(Protocol):
    """How a VAE works on videos of one size. All ranks call the same methods in the same order."""

    facts: dict[str, str]  # descriptions, for `Done.info`

    def steps(self, work: str, length: int) -> int:
        """The number of calls of `on_step` for a latent of `length` frames."""

    def own(self, frames: Tensor) -> Tensor | None:
        """The part of a video's frames that this rank reads."""

    def begin(self, output: Tensor) -> None:
        """Prepares the output that all ranks share, which has frames in dim 0."""

    def decoded(self, latent: Tensor, on_step: OnStep) -> Pieces:
        """Decodes a latent [C,T,H,W] to pieces of frames [3,t,h,w] in -1..1, or near there for terms of a sum."""

    def encoded(self, frames: Tensor, on_step: OnStep) -> Pieces:
        """Encodes frames [T,H,W,3] in 0..1 to pieces of a latent [C,t,h,w]."""

    def sums(self, output: Tensor) -> Tensor:
        """The part of the output that was added up, and that this rank is to finish. All ranks must call it, once all
        was added."""


class TilePerRank:
    """One tile on each rank, step by step. A rank without a tile takes part too, as all ranks agree after each step
    whether to continue."""

    def __init__(self, vae: VideoVae, tile: Tile | None, facts: dict[str, str]):
        self._vae, self._tile, self.facts = vae, tile, facts

    def steps(self, work: str, length: int) -> int:
        return len(self._vae.steps(work, length))

    def own(self, frames: Tensor) -> Tensor | None:
        return None if self._tile is None else _crop(frames, self._tile.place(self._vae.form.spatial))

    def begin(self, output: Tensor) -> None:
        """Each rank writes its own tile."""

    def sums(self, output: Tensor) -> Tensor:
        return output[:0]

    def decoded(self, latent: Tensor, on_step: OnStep) -> Pieces:
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else vae.decoded(_latent_chunks(vae, latent, tile.place()), tile)
        area = (slice(0), slice(0)) if tile is None else tile.place(vae.form.spatial)
        for chunk in vae.steps("decode", latent.shape[1]):
            on_step()
            content = next(made, None)
            if chunk is not None:
                yield Piece((_frames_of(vae, chunk), *area), content)

    def encoded(self, frames: Tensor, on_step: OnStep) -> Pieces:
        vae, tile = self._vae, self._tile
        made = iter(()) if tile is None else vae.encoded(_frame_chunks(vae, self.own(frames)), tile)
        area = (slice(0), slice(0)) if tile is None else tile.place()
        for chunk in vae.steps("encode", _latent_length(vae, frames)):
            on_step()
            content = next(made, None)
            if chunk is not None:
                yield Piece((chunk, *area), content)


class TilesInTurn:
    """One tile after the other on one device, each with all its frames."""

    def __init__(self, vae: VideoVae, blended: BlendedTiles, tiles: int, facts: dict[str, str]):
        self._vae, self._blended, self._tiles, self.facts = vae, blended, tiles, facts

    def steps(self, work: str, length: int) -> int:
        return self._tiles * len(self._vae.chunks(length))

    def own(self, frames: Tensor) -> Tensor:
        return frames[..., :3]

    def begin(self, output: Tensor) -> None:
        """The one rank writes all of it."""

    def sums(self, output: Tensor) -> Tensor:
        return output[:0]

    def decoded(self, latent: Tensor, on_step: OnStep) -> Pieces:
        def crop(area: Area) -> Iterator[Tensor]:
            return (on_step() or chunk for chunk in _latent_chunks(self._vae, latent, area))

        for area, made in self._blended.decoded(*latent.shape[2:], crop):
            yield Piece((slice(None), *area), made)

    def encoded(self, frames: Tensor, on_step: OnStep) -> Pieces:
        def crop(area: Area) -> Iterator[Tensor]:
            return (on_step() or chunk for chunk in _frame_chunks(self._vae, _crop(frames, area)))

        for area, made in self._blended.encoded(*frames.shape[1:3], crop):
            yield Piece((slice(None), *area), made)


class DealtTiles:
    """Tiles that overlap in frames, rows and columns: each rank computes whole tiles, and adds them to the output.

    The result has the same bits on any number of ranks of a machine (see overlapping.py). Several machines add up their
    own tiles, each in its own memory, and then their sums, which rounds differently.
    """

    def __init__(self, vae: VideoVae, rounds: list[Sequence[LatentTile]], facts: dict[str, str]):
        self._vae, self._rounds, self.facts = vae, rounds, facts
        self._ranks, self._rank = world_size(), this_rank()

    def steps(self, work: str, length: int) -> int:
        return len(self._rounds) * self._steps_of_tile(work)

    def own(self, frames: Tensor) -> Tensor:
        """A rank's share of what all ranks read."""
        return frames.tensor_split(self._ranks)[self._rank][..., :3]

    def begin(self, output: Tensor) -> None:
        here = machines()
        local = here.members[here.here]
        output.tensor_split(len(local))[local.index(self._rank)].zero_()
        all_reduce_max(0)  # no rank adds before all are zero

    def sums(self, output: Tensor) -> Tensor:
        shares = output.tensor_split(self._ranks)
        add_machines(shares)
        return shares[self._rank]

    def decoded(self, latent: Tensor, on_step: OnStep) -> Pieces:
        vae, (temporal, spatial) = self._vae, (self._vae.form.temporal, self._vae.form.spatial)

        def made(tile: LatentTile) -> Iterator[Tensor | None]:
            frames, *area = tile.reads
            return vae.unclipped(_latent_chunks(vae, latent[:, frames], tuple(area)), single_tile(*tile.size[1:]))

        for tile, content in self._computed("decode", made, on_step):
            frames, *area = tile.makes
            rows, columns = (slice(spatial * side.start, spatial * side.stop) for side in area)
            yield Piece((_frames_of(vae, frames), rows, columns), content, _weights(tile, temporal, spatial))

    def encoded(self, frames: Tensor, on_step: OnStep) -> Pieces:
        vae, (temporal, spatial) = self._vae, (self._vae.form.temporal, self._vae.form.spatial)

        def made(tile: LatentTile) -> Iterator[Tensor | None]:
            read, *area = tile.reads
            part = frames[temporal * read.start : temporal * (read.stop - 1) + 1]
            rows, columns = (slice(spatial * side.start, spatial * side.stop) for side in area)
            return vae.encoded(_frame_chunks(vae, _crop(part, (rows, columns))), single_tile(*tile.size[1:]))

        for tile, content in self._computed("encode", made, on_step):
            yield Piece(tile.makes, content, _weights(tile, 1, 1))

    def _computed(
        self, work: str, made: Callable[[LatentTile], Iterator[Tensor | None]], on_step: OnStep
    ) -> Iterator[tuple[LatentTile, Tensor]]:
        """This rank's tiles and what `made` yields of each, joined, when it is their turn to be added."""
        held: dict[LatentTile, Tensor] = {}
        for computed, sets in zip(self._rounds, additions(self._rounds)):
            tile = next(iter(computed[self._rank : self._rank + 1]), None)
            parts = iter(()) if tile is None else made(tile)
            for _ in range(self._steps_of_tile(work) - 1):
                on_step()
                next(parts, None)
            on_step()
            if tile is not None:
                dropped = tile.stretches[0].begin - tile.stretches[0].start
                held[tile] = torch.cat([part.cpu() for part in parts][dropped:], dim=1)
            for ready in sets:
                yield from ((one, held.pop(one)) for one in [*held] if one in ready)
                all_reduce_max(0)  # no rank adds the next set before all have added this one

    def _steps_of_tile(self, work: str) -> int:
        """Those that yield nothing, and one for all that yield frames."""
        return len(self._vae.steps(work, 1))


def _weights(tile: LatentTile, temporal: int, spatial: int) -> Tensor:
    """The weights [t,h,w] of a tile's content in the output's sum, in fp32."""
    frames, plane = tile.weights(temporal, spatial)
    return frames[:, None, None] * plane


# Which of them


class _Size(NamedTuple):
    """What is to be done, on which ranks."""

    vae: VideoVae
    work: str
    frames: int
    height: int
    width: int
    free: int

    @property
    def task(self) -> str:
        pixels = self.vae.form.spatial
        return f"To {self.work} {pixels * self.width} x {pixels * self.height} pixels"

    @property
    def grid(self) -> TileGrid:
        return grid_here(self.height, self.width)

    @property
    def whole(self) -> float:
        """The bytes that each rank needs for the largest tile of one plane."""
        return self.needed(self.frames, max(self.grid.heights), max(self.grid.widths), self.grid.tiles)

    def needed(self, frames: int, height: int, width: int, tiles: int = 1) -> float:
        return margin(self.vae.device) * self.vae.bytes_needed(self.work, frames, height, width, tiles)


def tiling_for(vae: VideoVae, work: str, frames: int, height: int, width: int, tiles: str = "auto") -> Tiling:
    """How to "decode" or "encode" a latent of this size in free memory. Collective: all ranks must call it.

    tiles: "whole": as one plane; "published": in the tiles of the VAE's authors; "auto": as one plane if it fits.
    Raises ValueError if it does not fit, or the VAE has no such tiles.
    """
    tile = None if tiles == "published" else tile_of(vae.device.type, height, width)  # its communicator takes memory
    size = _Size(vae, work, frames, height, width, -all_reduce_max(-devices.room(vae.device)))
    if tiles != "published" and size.whole <= size.free:
        grid = grid_here(height, width)
        facts = {"tiles": f"{len(grid.heights)} x {len(grid.widths)}", "memory": f"{size.whole / 1e9:.1f} GB a rank"}
        return TilePerRank(vae, tile, facts)
    cuts = vae.cuts(frames, height, width)
    if tiles == "whole":
        raise _too_large(size, "" if cuts is None else " Or set tiles to 'published'.")
    if cuts is not None:
        return _dealt(size, overlapping.cut_latent(cuts, (frames, height, width)), chosen=tiles == "published")
    if world_size() > 1 or (blended := vae.blend()) is None:
        raise _too_large(size) if tiles == "auto" else _no_published(vae)
    return _in_turn(size, blended)


def bytes_whole(vae: VideoVae, work: str, frames: int, height: int, width: int) -> int:
    """The bytes that each rank needs to "decode" or "encode" a latent of this size as one plane."""
    return int(_Size(vae, work, frames, height, width, free=0).whole)


def _too_large(size: _Size, cure: str = "") -> ValueError:
    free, vae, needed, ranks = max(size.free, 1), size.vae, size.whole, size.grid.tiles
    sides = (max(1, int(math.sqrt(free / needed) * side)) * vae.form.spatial for side in (size.width, size.height))
    on_cards = "" if vae.device.type == "cpu" else f", or {math.ceil(ranks * needed / free)} ranks"
    on_each = f" on each of {ranks} ranks" if ranks > 1 else ""
    return coded_error(
        "AV-1206",
        f"{size.task} takes {needed / 1e9:.1f} GB{on_each}, but {free / 1e9:.1f} GB are free. Use about "
        f"{' x '.join(map(str, sides))} pixels{on_cards}. Ascend Free Memory frees other models' weights.{cure}",
    )


def _no_published(vae: VideoVae) -> ValueError:
    why = f"makes tiles that overlap on one rank, and there are {world_size()}" if vae.blend() else "has no such tiles"
    return ValueError(f"tiles is 'published', but this VAE {why}. Set it to 'auto' or 'whole'.")


def _in_turn(size: _Size, blended: BlendedTiles) -> TilesInTurn:
    tiles, tile = blended.tiles_of(size.work, size.height, size.width)
    least = size.needed(size.frames, *tile)
    if least > size.free:
        raise _too_small(size, least, "small tiles")
    if size.whole > size.free:
        logger.warning(
            "%s takes %.1f GB, but %.1f GB are free: small tiles are used, and blended.",
            size.task, size.whole / 1e9, size.free / 1e9,
        )  # fmt: skip
    return TilesInTurn(size.vae, blended, tiles, {"tiles": f"{tiles} in turn", "memory": f"{least / 1e9:.1f} GB"})


def _dealt(size: _Size, tiles: list[LatentTile], chosen: bool) -> DealtTiles:
    """chosen: by the user, so that what one plane would take is not predicted, which takes a second or two."""
    vae, ranks = size.vae, world_size()
    largest = max(tiles, key=lambda tile: tile.work).size
    rounds = overlapping.dealt(tiles, ranks)
    least = size.needed(*largest)
    if vae.device.type == "cpu":
        least += max(overlapping.most_held(rounds, rank) for rank in range(ranks)) * _output_bytes(vae, size.work)
    if least > size.free:
        raise _too_small(size, least, f"tiles of {_pixels(vae, largest)}")
    if not chosen:
        taken, free = size.whole / 1e9, size.free / 1e9
        words = "%s takes %.1f GB, but %.1f GB are free: %d tiles are used, and blended."
        logger.info(words, size.task, taken, free, len(tiles))
    facts = {"tiles": f"{len(tiles)} of {_pixels(vae, largest)}, blended", "memory": f"{least / 1e9:.1f} GB a rank"}
    return DealtTiles(vae, rounds, facts)


def _pixels(vae: VideoVae, size: tuple[int, int, int]) -> str:
    frames, height, width = size
    spatial = vae.form.spatial
    return f"{spatial * width} x {spatial * height} pixels and {vae.form.temporal * (frames - 1) + 1} frames"


def _output_bytes(vae: VideoVae, work: str) -> int:
    """Bytes of the output for one element of the latent's frames, rows and columns."""
    form, itemsize = vae.form, vae.dtype.itemsize
    return itemsize * (form.channels if work == "encode" else 3 * form.temporal * form.spatial**2)


def _too_small(size: _Size, least: float, tiles: str) -> ValueError:
    half = "; the VAE in dtype bfloat16 takes half" if size.vae.dtype == torch.float32 else ""
    return coded_error(
        "AV-1206",
        f"{size.task} takes {size.whole / 1e9:.1f} GB, in {tiles} {least / 1e9:.1f} GB, but {size.free / 1e9:.1f} GB "
        f"are free. Ascend Free Memory frees other models' weights{half}.",
    )


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
