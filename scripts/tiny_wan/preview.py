"""Fits the linear map from latent channels to colours, for previews without the VAE."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from . import world
from .vae_model import encode

CLIPS = 32


@torch.no_grad()
def write_latent_rgb(folder: Path, vae: AutoencoderKLWan, mean: torch.Tensor, std: torch.Tensor, seed: int) -> None:
    """Fits RGB in -1..1 to normalised latents by least squares; saves factors `[16,3]` and a bias where ranks read
    them."""
    generator = torch.Generator().manual_seed(seed)
    clips = world.render(world.draw_scenes(world.train_scenes(), CLIPS, generator), generator)
    latents = (encode(vae, clips) - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)  # [B,16,t,h,w]
    colours = F.adaptive_avg_pool3d(clips, latents.shape[2:])
    known = latents.movedim(1, -1).flatten(0, 3)
    known = torch.cat((known, torch.ones(len(known), 1)), dim=1)
    fitted = torch.linalg.lstsq(known, colours.movedim(1, -1).flatten(0, 3)).solution
    *factors, bias = [[round(value, 4) for value in row] for row in fitted.tolist()]
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    (folder / "vae" / "latent_rgb.json").write_text(json.dumps({"factors": factors, "bias": bias}) + "\n")
