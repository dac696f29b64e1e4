"""What the files of a diffusion model say of it beside its weights: its experts, their boundary, its latents."""

from __future__ import annotations

import logging

import torch

from ..checkpoints.bounded import read_json
from ..checkpoints.faults import shown, usable
from ..models.defaults import Defaults
from ..models.wan import transformer as wan
from ..models.wan.configs import LATENTS_MEAN_22, LATENTS_STD_22
from ..models.wan.defaults import WAN22_TEXT
from ..recognition.layout import Component
from ..specs import DiffusionModelSpec
from ..specs.models import require_experts_in_order

logger = logging.getLogger(__name__)


def check_experts(found: list[Component]) -> dict[str, torch.Tensor]:
    """The latent format of a model's expert, or two in this order. Raises ValueError where they are not of a model that
    can be used."""
    latent_format = _latent_format(found[0])
    for component in found:
        _check_channels(component, found[0], latent_format["latents_mean"].shape[1])
    if len(found) == 2:
        require_experts_in_order(*(str(component.shards[0]) for component in found))
    return latent_format


def _check_channels(component: Component, first: Component, channels: int) -> None:
    """Raises ValueError for a transformer that does not make latents of this format, from text or from an image."""
    config, where = component.config, component.shards[0]
    inputs, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
    image_to_video = 2 * outputs + wan.MASK_CHANNELS
    if inputs not in (outputs, image_to_video):
        raise ValueError(
            f"{where} reads {inputs} channels and makes {outputs}. It must read {outputs}, as a text-to-video model, "
            f"or {image_to_video}, as an image-to-video model; other kinds (control, camera, VACE) cannot be used."
        )
    if outputs != channels:
        raise ValueError(
            f"{where} makes latents of {outputs} channels, but its latent format has {channels}. Take the whole "
            "diffusers folder of the model, whose vae/config.json has the format."
        )
    for key, default in (("text_dim", 4096), ("in_channels", 16), ("image_dim", None)):
        ours, theirs = config.get(key, default), first.config.get(key, default)
        if ours != theirs:
            raise ValueError(f"{where} has {key} {ours}, {first.shards[0]} {theirs}. Take both experts of one model.")


def boundary_of(spec: DiffusionModelSpec, component: Component, defaults: Defaults) -> float:
    boundary = own_boundary(component) if spec.boundary is None else spec.boundary
    return (defaults.boundary or WAN22_TEXT.boundary) if boundary is None else boundary


def own_boundary(component: Component) -> float | None:
    """What a model's folder says of it, if it does. Raises ValueError where that is no number from 0 to 1."""
    index = component.root and component.root / "model_index.json"
    boundary = read_json(index).get("boundary_ratio") if index and index.is_file() else None
    if boundary is not None and (type(boundary) not in (int, float) or not 0 <= boundary <= 1):
        raise ValueError(
            f"{index} has the boundary_ratio {shown(repr(boundary))}; it must be a number from 0 to 1, such as "
            f"{WAN22_TEXT.boundary}. Correct it, or download the file again."
        )
    return boundary


def _latent_format(component: Component) -> dict[str, torch.Tensor]:
    """How latents are normalised and pictured: by the VAE beside the model where it says so, else as of the published
    VAE with as many channels."""
    vae = component.root and component.root / "vae"
    config = read_json(vae / "config.json") if vae and (vae / "config.json").is_file() else {}
    rgb = read_json(vae / "latent_rgb.json") if vae and (vae / "latent_rgb.json").is_file() else {}
    known, said_by = (wan.LATENTS_MEAN, wan.LATENTS_STD), vae or component.shards[0]
    if component.config.get("out_channels", 16) == len(LATENTS_MEAN_22):
        known = (LATENTS_MEAN_22, LATENTS_STD_22)
    with usable(said_by, "its latents_mean and latents_std"):
        mean, std = (torch.tensor(config.get(key, own), dtype=torch.float32)
                     for key, own in zip(("latents_mean", "latents_std"), known))  # fmt: skip
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"they are of the shapes {list(mean.shape)} and {list(std.shape)}")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("they are not finite, or a latents_std is not above 0")
        mean, std = mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
    with usable(said_by, "its table of colours"):
        table = wan.LATENT_RGB.get(mean.numel(), {}) | rgb
        factors, bias = (torch.tensor(table.get(key, own), dtype=torch.float32)
                         for key, own in (("factors", ()), ("bias", (0.0, 0.0, 0.0))))  # fmt: skip
        channels = len(factors)
        if channels and factors.shape != (channels, 3) or bias.shape != (3,):
            raise ValueError(f"factors {list(factors.shape)} and bias {list(bias.shape)} are not [channels, 3] and [3]")
        if not (factors.isfinite().all() and bias.isfinite().all()):
            raise ValueError("it is not finite")
    if channels != mean.numel():
        logger.warning("No RGB table is known for latents of %d channels: there will be no previews.", mean.numel())
        factors = None
    return {"latents_mean": mean, "latents_std": std, "latent_rgb": factors, "latent_rgb_bias": bias}
