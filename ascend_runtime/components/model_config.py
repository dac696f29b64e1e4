"""Reads what a diffusion model's files say besides its weights: its experts, their boundary, its latent format."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoints.bounded import read_json
from ..checkpoints.faults import as_value_error
from ..errors import coded_error
from ..models.latent_format import LatentFormat
from ..recognition.component import Component
from ..specs.models import require_experts_in_order

logger = logging.getLogger(__name__)


def check_experts(found: list[Component]) -> LatentFormat:
    """The latent format of a model with one expert, or two: high noise, low noise. Raises ValueError for experts that
    do not make a supported model."""
    first = found[0]
    latents = _latent_format(first)
    files = [component.shards[0] for component in found]
    if len({component.kind for component in found}) > 1:
        what = " and ".join(f"{file} is a {component.kind.what}" for file, component in zip(files, found))
        raise coded_error("AV-1403", f"The experts belong to different families: {what}. Use two experts of one model.")
    first.family.check_transformers([component.config for component in found], files)
    for component, file in zip(found, files):
        channels = first.family.form(component.config).channels
        if channels != latents.channels:
            raise coded_error(
                "AV-1413",
                f"{file} makes latents of {channels} channels, but its latent format has {latents.channels}. Use the "
                "model's whole diffusers folder, whose vae/config.json contains the format.",
            )
    if len(found) == 2:
        require_experts_in_order(*map(str, files))
    return latents


def _latent_format(component: Component) -> LatentFormat:
    """From the config of the VAE next to the model, else from the published VAE with this number of channels."""
    vae = component.root and component.root / "vae"
    config, rgb = (read_json(vae / name) if vae and (vae / name).is_file() else {}
                   for name in ("config.json", "latent_rgb.json"))  # fmt: skip
    file = vae or component.shards[0]
    with as_value_error(file, "the normalisation of its latents"):
        latents = component.family.latent_format(component.config, config)
        mean, std = _numbers(latents.mean), _numbers(latents.std)
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"means and deviations have the shapes {list(mean.shape)} and {list(std.shape)}")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("its numbers are not finite, or a deviation is not above 0")
        latents = replace(latents, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    with as_value_error(file, "its RGB table"):
        return _coloured(latents, rgb)


def _coloured(latents: LatentFormat, table: dict) -> LatentFormat:
    """The format with the RGB table from the file next to a VAE. Raises ValueError for an invalid table."""
    factors, bias = _numbers(table.get("factors", latents.rgb or ())), _numbers(table.get("bias", latents.rgb_bias))
    channels = len(factors)
    if channels and factors.shape != (channels, 3) or bias.shape != (3,):
        raise ValueError(f"factors {list(factors.shape)} and bias {list(bias.shape)} are not [channels, 3] and [3]")
    if not (factors.isfinite().all() and bias.isfinite().all()):
        raise ValueError("it is not finite")
    rows = None
    if channels == latents.channels:
        rows = tuple(map(tuple, factors.tolist()))
    else:
        logger.warning("There is no RGB table for latents of %d channels: previews are off.", latents.channels)
    return LatentFormat(latents.mean, latents.std, rows, tuple(bias.tolist()))


def _numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
