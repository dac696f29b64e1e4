"""The bytes that a VAE's tiles take, by a dry run on the meta device."""

from __future__ import annotations

import json
from functools import lru_cache

from ...models.family import VAE, Family
from ..facts import Model, Video
from .passes import as_json


def tile_bytes(model: Model, video: Video, ranks: int, tiles: str, work: str) -> int:
    """Of the largest tile of a rank, without the weights and what kernels allocate internally. tiles: "whole" or
    "published". work: "decode" or "encode"."""
    return _tile_bytes(model.family, as_json(model.vae.config), model.vae_dtype, ranks, tiles, work, video.shape[2:])


@lru_cache(maxsize=256)
def _tile_bytes(
    family: Family, config: str, dtype: str, ranks: int, tiles: str, work: str, size: tuple[int, int, int]
) -> int:
    from ...models.shared.overlapping import cut_latent
    from ...parallel.tiles import grid_of

    vae = _empty_vae(family, config, dtype)
    frames, height, width = size
    if tiles == "published" and (cuts := vae.cuts(*size)) is not None:
        return vae.bytes_needed(work, *max(cut_latent(cuts, size), key=lambda tile: tile.work).size)
    if tiles == "published" and (blended := vae.blend()) is not None:
        _, tile = blended.tiles_of(work, height, width)
        return vae.bytes_needed(work, frames, *tile)
    grid = grid_of(ranks, height, width)
    return vae.bytes_needed(work, frames, max(grid.heights), max(grid.widths), grid.tiles)


@lru_cache(maxsize=4)
def _empty_vae(family: Family, config: str, dtype: str):
    """A VAE on the meta device."""
    import torch

    network = family.network(VAE, json.loads(config))
    return family.vae(torch.nn.Module.to(network, getattr(torch, dtype)), family.vae_form(json.loads(config)))
