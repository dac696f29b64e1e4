"""The bytes that a VAE's tiles take, by a dry run on the meta device."""

from __future__ import annotations

import json
import math
from functools import lru_cache

from ..models.family import VAE, Family
from .facts import Arrangement, Machine, Model, Video


def tile_bytes(model: Model, video: Video, arrangement: Arrangement, machine: Machine, work: str) -> int:
    """Of the largest tile, without the weights and what kernels allocate internally."""
    _, _, frames, height, width = video.shape
    config = json.dumps(dict(model.vae.config), default=list)
    ranks = math.prod(arrangement.plan.degrees)
    return _tile_bytes(model.family, config, model.vae_dtype, ranks, arrangement.tiles, work, (frames, height, width))


@lru_cache(maxsize=256)
def _tile_bytes(
    family: Family, config: str, dtype: str, ranks: int, tiles: str, work: str, size: tuple[int, int, int]
) -> int:
    import torch

    from ..parallel.tiles import grid_of

    network = family.network(VAE, json.loads(config))
    vae = family.vae(torch.nn.Module.to(network, getattr(torch, dtype)), family.vae_form(json.loads(config)))
    frames, height, width = size
    if tiles == "published" and (cuts := vae.cuts(*size)) is not None:
        from ..models.shared.overlapping import cut_latent

        largest = max(cut_latent(cuts, size), key=lambda tile: tile.work).size
        return vae.bytes_needed(work, *largest)
    if tiles == "published" and (blended := vae.blend()) is not None:
        _, tile = blended.tiles_of(work, height, width)
        return vae.bytes_needed(work, frames, *tile)
    grid = grid_of(ranks, height, width)
    return vae.bytes_needed(work, frames, max(grid.heights), max(grid.widths), grid.tiles)
