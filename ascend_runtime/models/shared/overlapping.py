"""Overlapping tiles of a latent in frames, rows and columns, dealt to ranks, and blended where they are written.

The output is a weighted sum: the weights of two neighbours are linear where they overlap, and the sum of all is 1. A
pixel is in up to 8 tiles, one of each colour (the parities of a tile's number along each axis). Ranks add their tiles
to memory that they share, colour by colour, so that sums have one order and the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stretch:
    """A tile along one axis of a latent.

    start, stop: what it reads. begin: where its output begins; what it makes before that is dropped.
    before, after: the length of its overlap with its neighbours' output.
    """

    start: int
    stop: int
    begin: int
    before: int = 0
    after: int = 0

    def weights(self, scale: int, power: int = 1) -> Tensor:
        """The weights of its output, which has `scale` elements for each of the latent's; but one for a video's first
        frame, which overlaps with no other tile. Where it overlaps, the later tile's share grows with this power."""
        ones = torch.ones(scale * (self.stop - self.begin))
        before, after = scale * self.before, scale * self.after
        ones[:before] = (torch.arange(before) / max(before, 1)) ** power
        ones[len(ones) - after :] = 1 - (torch.arange(after) / max(after, 1)) ** power
        return ones


@dataclass(frozen=True)
class Cut:
    """How an axis of a latent is cut: tiles of `size` at a stride. dropped: the first elements of the output of all
    tiles but the first that are not used."""

    size: int
    stride: int
    dropped: int = 0

    def stretches(self, length: int) -> list[Stretch]:
        ends = [(start, min(start + self.size, length)) for start in range(0, length, self.stride)]
        parts = [(start, stop, start + self.dropped * (start > 0)) for start, stop in ends]
        parts = [part for part in parts if part[2] < part[1]]
        overlaps = [0, *(one[1] - other[2] for one, other in zip(parts, parts[1:])), 0]
        return [Stretch(*part, *around) for part, *around in zip(parts, overlaps, overlaps[1:])]


@dataclass(frozen=True)
class LatentTile:
    """number: of the tile along each axis [T, H, W]."""

    number: tuple[int, int, int]
    stretches: tuple[Stretch, Stretch, Stretch]

    @property
    def size(self) -> tuple[int, int, int]:
        """Of the latent that it reads, [T, H, W]."""
        frames, height, width = (side.stop - side.start for side in self.stretches)
        return frames, height, width

    @property
    def work(self) -> int:
        frames, height, width = self.size
        return frames * height * width

    @property
    def reads(self) -> tuple[slice, slice, slice]:
        frames, rows, columns = (slice(side.start, side.stop) for side in self.stretches)
        return frames, rows, columns

    @property
    def makes(self) -> tuple[slice, slice, slice]:
        """The part of the latent whose output it makes."""
        frames, rows, columns = (slice(side.begin, side.stop) for side in self.stretches)
        return frames, rows, columns

    @property
    def colour(self) -> int:
        """Tiles of one colour do not overlap."""
        frames, row, column = (number % 2 for number in self.number)
        return 4 * frames + 2 * row + column

    def overlaps(self, other: LatentTile) -> bool:
        return all(abs(one - another) <= 1 for one, another in zip(self.number, other.number))

    def weights(self, temporal: int, spatial: int) -> tuple[Tensor, Tensor]:
        """The weights of its output along frames [t] and in the plane [h, w], which has so many elements for each of
        the latent's.

        The published code blends a tile with the one above, which is already blended with its left neighbour, and then
        with its own left neighbour: where four tiles meet, the upper two are blended twice along the row.
        """
        frames, rows, columns = self.stretches
        first = temporal - 1 if frames.begin == 0 else 0
        down, across = rows.weights(spatial), columns.weights(spatial).expand(spatial * (rows.stop - rows.begin), -1)
        twice = columns.weights(spatial, power=2).expand(spatial * rows.after, -1)
        across = torch.cat((across[: len(across) - len(twice)], twice))
        return frames.weights(temporal)[first:], down[:, None] * across


def cut_latent(cuts: tuple[Cut, Cut, Cut], size: tuple[int, int, int]) -> list[LatentTile]:
    """The tiles of a latent of this size [T, H, W], frames outermost."""
    axes = [list(enumerate(cut.stretches(length))) for cut, length in zip(cuts, size)]
    return [LatentTile(*zip(*parts)) for parts in product(*axes)]


def dealt(tiles: Sequence[LatentTile], ranks: int) -> list[Sequence[LatentTile]]:
    """The tiles that the ranks compute at the same time, round by round; rank r takes number r of each. All ranks wait
    for the largest tile of a round, so those of a round are nearly equal in work."""
    order = sorted(tiles, key=lambda tile: (-tile.work if ranks > 1 else 0, tile.colour))
    return [order[start : start + ranks] for start in range(0, len(order), ranks)]


def additions(rounds: Sequence[Sequence[LatentTile]]) -> list[list[set[LatentTile]]]:
    """For each round, sets of tiles that are added to the output after it, one set after the other: as soon as all
    tiles of lower colours that they overlap with have been added."""
    tiles = [tile for computed in rounds for tile in computed]
    lower = {tile: {one for one in tiles if one.colour < tile.colour and one.overlaps(tile)} for tile in tiles}
    added: set[LatentTile] = set()
    waiting: list[LatentTile] = []
    plan = []
    for computed in rounds:
        waiting += computed
        sets = []
        for colour in range(8):
            ready = {tile for tile in waiting if tile.colour == colour and lower[tile] <= added}
            added |= ready
            sets += [ready] if ready else []
        waiting = [tile for tile in waiting if tile not in added]
        plan.append(sets)
    return plan


def most_held(rounds: Sequence[Sequence[LatentTile]], rank: int) -> int:
    """The largest sum of `work` of a rank's tiles that wait to be added, with the one that it computes."""
    held, most = 0, 0
    own = {tile for computed in rounds for tile in computed[rank : rank + 1]}
    for computed, sets in zip(rounds, additions(rounds)):
        held += sum(tile.work for tile in computed[rank : rank + 1])
        most = max(most, held)
        held -= sum(tile.work for ready in sets for tile in ready & own)
    return most
