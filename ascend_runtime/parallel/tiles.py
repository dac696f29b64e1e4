"""A plane over several ranks: a grid of tiles, whose neighbours exchange borders.

Exact: what a convolution reads beyond the edge of its tile is what it would read in the whole plane. Columns travel
after rows, and take along what of rows has arrived: corners come so from the diagonal neighbour, by no message of their
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import all_gather, pad_end

Place = tuple[slice, slice]  # rows and columns of a plane
Edges = tuple[int, int, int, int]  # pixels beyond a plane's left, right, top and bottom, as torch's padding has them


@dataclass(frozen=True)
class Grid:
    """How a plane is cut: the heights of the rows of tiles and the widths of their columns, in pixels of its coarsest
    form, such as a latent's. A finer form is cut at the same places."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def tiles(self) -> int:
        return len(self.heights) * len(self.widths)

    @property
    def largest(self) -> int:
        """Pixels of the largest tile, which all ranks wait for."""
        return max(self.heights) * max(self.widths)

    @property
    def border(self) -> int:
        """Pixels that lie at a cut."""
        height, width = sum(self.heights), sum(self.widths)
        return 2 * (width * (len(self.heights) - 1) + height * (len(self.widths) - 1))


@lru_cache(maxsize=None)
def grid_of(ranks: int, height: int, width: int) -> Grid:
    """The cut of a plane for this many ranks: the largest tile is as small as it can be, then the border. A plane with
    fewer pixels than ranks leaves some without a tile.

    A tile's time is that of its pixels: of 60 x 104 in 4 or in 8, rows, columns and both took the same within 2 % and
    7 % (one thread of an x86).
    """
    grids = [
        Grid(_even(height, rows), _even(width, columns))
        for rows in range(1, min(ranks, height) + 1)
        for columns in range(1, min(ranks // rows, width) + 1)
    ]
    return min(grids, key=lambda grid: (grid.largest, grid.border, grid.tiles))


def _even(size: int, parts: int) -> tuple[int, ...]:
    """As even as can be; the first ones are larger by one."""
    return tuple(size // parts + (part < size % parts) for part in range(parts))


@dataclass(frozen=True)
class Tile:
    """The tile of the rank that holds number `index` of a grid, row by row; rank and index are the same number."""

    grid: Grid
    index: int

    @property
    def row(self) -> int:
        return self.index // len(self.grid.widths)

    @property
    def column(self) -> int:
        return self.index % len(self.grid.widths)

    def place(self, scale: int = 1) -> Place:
        """Its rows and columns in the plane, `scale` pixels for each of the coarsest form."""
        heights, widths = ([0, *accumulate(sizes)] for sizes in (self.grid.heights, self.grid.widths))
        rows = slice(scale * heights[self.row], scale * heights[self.row + 1])
        return rows, slice(scale * widths[self.column], scale * widths[self.column + 1])

    def sent_first(self, edges: Edges) -> list[Place]:
        """The parts of the tile that `fill_edges` sends at once: the rows at its cuts, or where the plane is cut into
        columns alone, those."""
        left, right, top, bottom = edges
        above, below, before, after = self._neighbours
        if len(self.grid.heights) > 1:
            return [(rows, slice(None)) for rows in _ends((bottom, top), (above, below))]
        return [(slice(None), columns) for columns in _ends((right, left), (before, after))]

    def fill_edges(self, x: Tensor, edges: Edges, replicate: bool = False) -> Callable[[], None]:
        """Fills what lies around the tile in the middle of x [..., top + h + bottom, left + w + right]: by what
        neighbours hold, and beyond the edge of the plane by zeros, or with `replicate` by the plane's nearest pixel.
        Begins with that, when all that `sent_first` names is in x, and returns what ends it, to be called when the
        whole tile is.

        All tiles of the grid must ask, with the same edges. Sends, a rank, for each of the leading elements: w x bottom
        to the tile above, w x top to that below, (top + h + bottom) x right to the left one, and x left to the right
        one, where there are such.
        """
        left, right, top, bottom = edges
        above, below, before, after = self._neighbours
        begin_rows = partial(_fill_dim, dim=-2, sizes=(top, bottom), neighbours=(above, below), replicate=replicate)
        begin_columns = partial(_fill_dim, x, -1, (left, right), (before, after), replicate)
        inner = x.narrow(-1, left, x.shape[-1] - left - right)
        if len(self.grid.heights) > 1:
            rows_arrive = begin_rows(inner)

            def end() -> None:
                rows_arrive()
                begin_columns()()

            return end
        if not replicate:
            begin_rows(inner)
            return begin_columns()
        columns_arrive = begin_columns()

        def end_with_rows() -> None:  # which are made of the columns that have arrived
            columns_arrive()
            begin_rows(x)()

        return end_with_rows

    @property
    def _neighbours(self) -> tuple[int | None, int | None, int | None, int | None]:
        """The tiles above, below, before and after it."""
        rows, columns = len(self.grid.heights), len(self.grid.widths)
        return (
            self.index - columns if self.row else None,
            self.index + columns if self.row + 1 < rows else None,
            self.index - 1 if self.column else None,
            self.index + 1 if self.column + 1 < columns else None,
        )

    def summed(self, values: Tensor) -> Tensor:
        """The sums of `values` over all tiles, in fp64 on the CPU: what a norm over the whole plane counts. All tiles
        of the grid must ask. Travels over the control backend (Gloo)."""
        values = values.cpu().to(torch.float64, copy=True)
        if self.grid.tiles > 1:
            dist.all_reduce(values, group=_group(self.grid.tiles))
        return values

    def gather(self, tokens: Tensor) -> Tensor:
        """tokens [B, h*w, C] of all tiles, in a row [B, H*W, C]: that of the tiles, not that of the plane.

        Sends, a rank: (tiles - 1) times the bytes of the largest tile's tokens.
        """
        grid = self.grid
        if grid.tiles == 1:
            return tokens
        sizes = [height * width for height in grid.heights for width in grid.widths]
        scale = tokens.shape[1] // sizes[self.index]
        padded = pad_end(tokens, 1, scale * grid.largest)
        gathered = all_gather(padded, _group(grid.tiles))  # [tiles, B, largest, C]
        return torch.cat([part[:, : scale * size] for part, size in zip(gathered, sizes)], dim=1)


def whole(height: int, width: int) -> Tile:
    """The tile of a plane that is not cut."""
    return Tile(Grid((height,), (width,)), 0)


def grid_here(height: int, width: int) -> Grid:
    """The cut of a plane for all ranks."""
    return grid_of(dist.get_world_size(), height, width)


def tile_of(height: int, width: int) -> Tile | None:
    """This rank's tile of a plane over all ranks; None where it has none. Every rank must ask."""
    grid = grid_here(height, width)
    _group(grid.tiles)
    return Tile(grid, dist.get_rank()) if dist.get_rank() < grid.tiles else None


@lru_cache(maxsize=None)
def _group(tiles: int) -> dist.ProcessGroup:
    """The ranks that have a tile. Making a group takes all ranks."""
    return dist.group.WORLD if tiles == dist.get_world_size() else dist.new_group(range(tiles))


def _ends(sizes: tuple[int, int], neighbours: tuple[int | None, int | None]) -> list[slice]:
    """So many pixels at the beginning and at the end, where there is a neighbour to read them."""
    (first, last), (before, after) = sizes, neighbours
    beginning = [slice(0, first)] if first and before is not None else []
    return beginning + ([slice(-last, None)] if last and after is not None else [])


def _fill_dim(
    x: Tensor, dim: int, sizes: tuple[int, int], neighbours: tuple[int | None, int | None], replicate: bool
) -> Callable[[], None]:
    """Begins to fill the first and the last pixels of x along `dim` from the rank before and the rank after. Returns
    what waits for them, and repeats the pixels at the plane's edge where that is wanted: they are there by then."""
    (first, last), length = sizes, x.shape[dim]
    borders = (x.narrow(dim, 0, first), x.narrow(dim, length - last, last))
    wanted = (x.narrow(dim, first, last), x.narrow(dim, length - last - first, first))  # by the neighbours
    nearest = (x.narrow(dim, first, 1), x.narrow(dim, length - last - 1, 1))
    exchanges, arriving, repeated = [], [], []
    for border, own, edge, neighbour in zip(borders, wanted, nearest, neighbours):
        if neighbour is None:
            if replicate:
                repeated.append((border, edge))
            else:
                border.zero_()
            continue
        if own.numel():
            exchanges.append(dist.P2POp(dist.isend, own.clone(memory_format=torch.contiguous_format), neighbour))
        if border.numel():
            arriving.append((border, border.new_empty(border.shape)))
            exchanges.append(dist.P2POp(dist.irecv, arriving[-1][1], neighbour))
    under_way = dist.batch_isend_irecv(exchanges) if exchanges else ()

    def arrive() -> None:
        for work in under_way:
            work.wait()
        for border, arrived in (*arriving, *repeated):
            border.copy_(arrived)

    return arrive
