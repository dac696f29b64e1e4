"""Trains the VAE: on single frames, short clips, whole clips; later only its decoder, on fixed latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from . import world
from .loop import Stage
from .vae_model import build_vae, decode, encode, use_single_frame_fast_conv

NOISE_STD = 0.1  # of the latent in training: keeps it smooth, and the decoder robust
OBJECT_WEIGHT = 3.0  # the object's edge decides which shape is read
# (fraction of the budget, frames per clip, side of the crop in pixels, clips per step)
PHASES = ((0.35, 1, 64, 16), (0.65, 5, 64, 4), (0.92, 17, 32, 2), (1.00, 17, 64, 1))


def vae_stage(minutes: float, device: str, lr: float = 1e-2) -> Stage:
    vae = use_single_frame_fast_conv(build_vae()).to(device).train()

    def step(progress: float, generator: torch.Generator) -> torch.Tensor:
        num_frames, side, batch = next(phase[1:] for phase in PHASES if progress < phase[0])
        clips, background = draw_crops(num_frames, side, batch if device == "cpu" else 4 * batch, generator)
        clips = clips.to(device)
        latents = encode(vae, clips)
        hinge = 0.1 * (latents.abs() - 1).clamp_min(0).square().mean()
        return reconstruction_loss(vae, latents, clips, background.to(device)) + hinge

    return Stage("vae", [vae], step, minutes, lr, adam_names=("conv_in", "decoder.conv_out"))


def decoder_stage(vae: AutoencoderKLWan, minutes: float, device: str, lr: float = 2e-3) -> Stage:
    """Trains only the decoder, for sharper frames from the latents that the transformer has learned."""
    vae = use_single_frame_fast_conv(vae).to(device).train()
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def step(progress: float, generator: torch.Generator) -> torch.Tensor:
        _, num_frames, side, batch = PHASES[-2 if progress < 0.7 else -1]
        clips, background = draw_crops(num_frames, side, batch if device == "cpu" else 4 * batch, generator)
        clips = clips.to(device)
        with torch.no_grad():
            latents = encode(vae, clips)
        return reconstruction_loss(vae, latents, clips, background.to(device))

    return Stage("decoder", [decoder], step, minutes, lr, adam_names=("conv_in", "conv_out"))


def draw_crops(num_frames: int, side: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops `[B,3,T,side,side]` of new clips, and their plain backgrounds `[B,3,1,1,1]`."""
    scenes = world.draw_scenes(world.train_scenes(), batch, generator)
    clips = world.render(scenes, generator, num_frames)
    top, left = torch.randint(world.SIZE - side + 1, (2,), generator=generator).tolist()
    return clips[..., top : top + side, left : left + side], clips[:, :, :1, :1, :1]  # no object covers the corner


def reconstruction_loss(
    vae: AutoencoderKLWan, latents: torch.Tensor, clips: torch.Tensor, background: torch.Tensor
) -> torch.Tensor:
    """Mean squared and absolute error of the frames decoded from noisy latents, weighted towards the object."""
    noisy = latents + NOISE_STD * torch.randn_like(latents)
    error = decode(vae, noisy) - clips
    weight = 1 + OBJECT_WEIGHT * ((clips - background).abs().amax(1, keepdim=True) > 0.02)
    weight = weight / weight.mean()
    return ((error.square() + 0.3 * error.abs()) * weight).mean()
