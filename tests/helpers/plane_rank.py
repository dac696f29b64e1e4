"""A rank of a plane in tiles, for a test: `main()` by gloo_ranks, in FOLDER.

In every grid of so many tiles it compares what lies around its tile, with the plane's edge repeated, and its part of
two norms over the whole plane, with what torch makes of the plane. Each norm's error goes to errors-RANK.json.
"""

import json

import gloo_ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ascend_runtime.models.shared.group_norm import TiledGroupNorm
from ascend_runtime.parallel.tiles import TileGrid, Tile

GRIDS = [((5, 4), (7, 6)), ((9,), (4, 3, 3, 3)), ((3, 2, 2, 2), (13,)), ((2, 2, 1, 4), (13,))]
EDGES = [(1, 1, 1, 1), (1, 0, 1, 0), (0, 2, 0, 2), (1, 1, 0, 0), (0, 0, 1, 1)]


def main():
    folder, rank, ranks = gloo_ranks.join()
    generator, errors = torch.Generator().manual_seed(3), {}
    plane = torch.randn(2, 8, 3, 9, 13, generator=generator)
    for grid in (TileGrid(*sides) for sides in GRIDS):
        assert grid.tiles == ranks
        tile = Tile(grid, rank, dist.group.WORLD)
        for edges in EDGES:
            if min(grid.heights) < max(edges[2:]) or min(grid.widths) < max(edges[:2]):
                continue
            filled, expected = around(tile, plane, edges)
            assert torch.equal(filled, expected), (grid, edges)
        for name, x in {"plain": plane, "far from zero": 50 + 3 * plane}.items():
            errors[f"{name}, {grid}"] = norms_apart(tile, x, generator)
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


def around(tile, plane, edges):
    """The tile with its edges, by its neighbours and by torch."""
    left, right, top, bottom = edges
    rows, columns = tile.place()
    own = plane[..., rows, columns]
    x = plane.new_full((*own.shape[:-2], top + own.shape[-2] + bottom, left + own.shape[-1] + right), torch.nan)
    inner = x[..., top : top + own.shape[-2], left : left + own.shape[-1]]
    for place in tile.sent_first(edges):
        inner[(..., *place)].copy_(own[(..., *place)])
    arrive = tile.fill_edges(x, edges, replicate=True)
    inner.copy_(own)
    arrive()
    padded = F.pad(plane, (*edges, 0, 0), mode="replicate")
    return x, padded[..., rows.start : rows.stop + top + bottom, columns.start : columns.stop + left + right]


@torch.no_grad()
def norms_apart(tile, x, generator):
    """The largest difference between the tile's norm and the plane's."""
    norm = TiledGroupNorm(4, x.shape[1], eps=1e-6)
    norm.weight.copy_(torch.randn(x.shape[1], generator=generator))
    norm.bias.copy_(torch.randn(x.shape[1], generator=generator))
    rows, columns = tile.place()
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)[..., rows, columns]
    return float((norm(x[..., rows, columns].contiguous(), tile) - exact).abs().max())
