"""The latent cache between the two trainings: draws clips, encodes them once, and normalises by measured statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tqdm import trange

from . import world
from .vae_model import encode

CHUNK = 16


@torch.no_grad()
def cache_latents(vae: AutoencoderKLWan, count: int, path: Path, seed: int, device: str) -> None:
    """Encodes `count` clips, evenly over the trained scenes; saves latents `[N,16,t,h,w]`, captions, `[16]`
    statistics."""
    generator = torch.Generator().manual_seed(seed)
    trained = world.train_scenes()
    scenes = [trained[i % len(trained)] for i in range(count)]
    vae = vae.to(device)
    latents = []
    for start in trange(0, count, CHUNK, desc="latents", unit_scale=CHUNK, unit="clip", mininterval=5):
        clips = world.render(scenes[start : start + CHUNK], generator)
        latents.append(encode(vae, clips.to(device)).cpu())
    latents = torch.cat(latents)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    captions = [scene.caption for scene in scenes]
    torch.save({"latents": latents, "captions": captions, "mean": mean, "std": std}, path)


def load_latents(path: Path) -> dict:
    """Loads what `cache_latents` saved, with the latents normalised to mean 0 and standard deviation 1 in each
    channel."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run the stage 'latents' first")
    cache = torch.load(path, weights_only=True)
    shape = (-1, 1, 1, 1)
    return cache | {"latents": (cache["latents"] - cache["mean"].view(shape)) / cache["std"].view(shape)}
