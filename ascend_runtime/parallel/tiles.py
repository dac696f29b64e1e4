"""Splits a plane into a grid of tiles, one for each rank; neighbours exchange halos.

The result is exact: beyond the edge of its tile, a convolution reads what it would read in the whole plane. Halo
columns are sent after halo rows and include the rows received, so corners arrive from the diagonal neighbour without a
message of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import all_gather, group_of, pad_end

Area = tuple[slice, slice]  # rows and columns of a plane
Edges = tuple[int, int, int, int]  # halo sizes in pixels: left, right, top, bottom, as in torch's padding


@dataclass(frozen=True)
class TileGrid:
    """How a plane is cut: the heights of the tile rows and the widths of the tile columns, in pixels of the coarsest
    resolution, such as a latent's. Finer resolutions are cut at the same positions."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def tiles(self) -> int:
        return len(self.heights) * len(self.widths)

    @property
    def sizes(self) -> list[int]:
        """The pixels of each tile."""
        return [height * width for height in self.heights for width in self.widths]

    @property
    def largest(self) -> int:
        """The pixels of the largest tile, for which all ranks wait."""
        return max(self.heights) * max(self.widths)

    @property
    def border(self) -> int:
        """The pixels along the cuts, on both sides."""
        height, width = sum(self.heights), sum(self.widths)
        return 2 * (width * (len(self.heights) - 1) + height * (len(self.widths) - 1))


@lru_cache(maxsize=None)
def grid_of(ranks: int, height: int, width: int) -> TileGrid:
    """The grid of a plane for this many ranks: minimises the largest tile, then the border. If a plane has fewer pixels
    than there are ranks, some ranks have no tile.

    A tile's time depends only on its pixels: for 60 x 104 cut into 4 or 8 tiles, by rows, columns or both, times differ
    by at most 2 % and 7 % (one thread of an x86 CPU).
    """
    grids = [
        TileGrid(_even(height, rows), _even(width, columns))
        for rows in range(1, min(ranks, height) + 1)
        for columns in range(1, min(ranks // rows, width) + 1)
    ]
    return min(grids, key=lambda grid: (grid.largest, grid.border, grid.tiles))


def _even(size: int, parts: int) -> tuple[int, ...]:
    """`size` in parts that differ by at most one, the larger ones first."""
    return tuple(size // parts + (part < size % parts) for part in range(parts))


@dataclass(frozen=True)
class Tile:
    """Tile number `index` of a grid, counted row by row; it belongs to the rank of the same number in `group`.

    group: the ranks that have a tile; None for a single tile."""

    grid: TileGrid
    index: int
    group: dist.ProcessGroup | None = None

    @property
    def row(self) -> int:
        return self.index // len(self.grid.widths)

    @property
    def column(self) -> int:
        return self.index % len(self.grid.widths)

    def place(self, scale: int = 1) -> Area:
        """Its rows and columns in the plane at `scale` times the coarsest resolution."""
        heights, widths = ([0, *accumulate(sizes)] for sizes in (self.grid.heights, self.grid.widths))
        rows = slice(scale * heights[self.row], scale * heights[self.row + 1])
        return rows, slice(scale * widths[self.column], scale * widths[self.column + 1])

    def sent_first(self, edges: Edges) -> list[Area]:
        """The parts of the tile that `fill_edges` sends first: the rows at its cuts, or the columns if the plane is cut
        only into columns."""
        left, right, top, bottom = edges
        if len(self.grid.heights) > 1:
            return [(rows, slice(None)) for rows in _ends((bottom, top), self._neighbours(-2))]
        return [(slice(None), columns) for columns in _ends((right, left), self._neighbours(-1))]

    def fill_edges(self, x: Tensor, edges: Edges, replicate: bool = False) -> Callable[[], None]:
        """Fills the halo of the tile in the middle of x [..., top + h + bottom, left + w + right] with the neighbours'
        pixels; beyond the plane with zeros, or if `replicate`, with the nearest pixel. Collective over all tiles of the
        grid, with the same edges.

        Starts the exchange; the parts of the tile named by `sent_first` must be in x. Returns a function that completes
        it; call it when the whole tile is in x.

        Communication per rank, for each of the leading elements: sends w x bottom pixels to the tile above, w x top to
        the tile below, (top + h + bottom) x right to the left tile, and (top + h + bottom) x left to the right tile.
        """
        left, right, top, bottom = edges
        inner = x.narrow(-1, left, x.shape[-1] - left - right)
        if len(self.grid.heights) > 1:
            rows_arrive = self._fill_dim(inner, -2, (top, bottom), replicate)

            def end() -> None:
                rows_arrive()
                self._fill_dim(x, -1, (left, right), replicate)()

            return end
        if not replicate:
            self._fill_dim(inner, -2, (top, bottom))
            return self._fill_dim(x, -1, (left, right))
        columns_arrive = self._fill_dim(x, -1, (left, right), replicate)

        def end_with_rows() -> None:  # which are made of the columns that have arrived
            columns_arrive()
            self._fill_dim(x, -2, (top, bottom), replicate)()

        return end_with_rows

    def _neighbours(self, dim: int) -> tuple[int | None, int | None]:
        """The tiles above and below it (dim -2), or left and right of it (dim -1)."""
        columns = len(self.grid.widths)
        place, places, step = (self.row, len(self.grid.heights), columns) if dim == -2 else (self.column, columns, 1)
        return self.index - step if place else None, self.index + step if place + 1 < places else None

    def _fill_dim(self, x: Tensor, dim: int, sizes: tuple[int, int], replicate: bool = False) -> Callable[[], None]:
        """Starts to fill the first and last pixels of x along `dim` from the neighbours. Returns a function that waits
        for them, and that repeats the pixels at the plane's edge if `replicate`."""
        (first, last), length = sizes, x.shape[dim]
        borders = (x.narrow(dim, 0, first), x.narrow(dim, length - last, last))
        sent = (x.narrow(dim, first, last), x.narrow(dim, length - last - first, first))
        nearest = (x.narrow(dim, first, 1), x.narrow(dim, length - last - 1, 1))
        exchanges, arriving, repeated = [], [], []
        for border, own, edge, neighbour in zip(borders, sent, nearest, self._neighbours(dim)):
            if neighbour is None:
                if replicate:
                    repeated.append((border, edge))
                else:
                    border.zero_()
                continue
            peer = dist.get_global_rank(self.group, neighbour)
            if own.numel():
                whole = own.clone(memory_format=torch.contiguous_format)
                exchanges.append(dist.P2POp(dist.isend, whole, peer, self.group))
            if border.numel():
                arriving.append((border, border.new_empty(border.shape)))
                exchanges.append(dist.P2POp(dist.irecv, arriving[-1][1], peer, self.group))
        under_way = dist.batch_isend_irecv(exchanges) if exchanges else ()

        def arrive() -> None:
            for work in under_way:
                work.wait()
            for border, arrived in (*arriving, *repeated):
                border.copy_(arrived)

        return arrive

    def gather(self, tokens: Tensor) -> Tensor:
        """All-gathers the tokens [B, h*w, C] of all tiles to [B, H*W, C], in the order of the tiles, not of the plane.

        Communication per rank: sends (tiles - 1) times the bytes of the largest tile's tokens.
        """
        grid = self.grid
        if grid.tiles == 1:
            return tokens
        sizes = grid.sizes
        scale = tokens.shape[1] // sizes[self.index]
        padded = pad_end(tokens, 1, scale * grid.largest)
        gathered = all_gather(padded, self.group)  # [tiles, B, largest, C]
        return torch.cat([part[:, : scale * size] for part, size in zip(gathered, sizes)], dim=1)


def single_tile(height: int, width: int) -> Tile:
    """A tile that covers the whole plane."""
    return Tile(TileGrid((height,), (width,)), 0)


def grid_here(height: int, width: int) -> TileGrid:
    """The grid of a plane for all ranks."""
    return grid_of(dist.get_world_size(), height, width)


def tile_of(kind: str, height: int, width: int) -> Tile | None:
    """This rank's tile of a plane on `kind` devices, if it has one. Collective: all ranks must call it."""
    grid = grid_here(height, width)
    if grid.tiles == 1:
        return Tile(grid, 0) if dist.get_rank() == 0 else None
    group = group_of(kind, (tuple(range(grid.tiles)),))
    return None if group is None else Tile(grid, dist.get_rank(group), group)


def _ends(sizes: tuple[int, int], neighbours: tuple[int | None, int | None]) -> list[slice]:
    """The first `sizes[0]` and last `sizes[1]` pixels, each only if there is a neighbour that needs them."""
    (first, last), (before, after) = sizes, neighbours
    beginning = [slice(0, first)] if first and before is not None else []
    return beginning + ([slice(-last, None)] if last and after is not None else [])
