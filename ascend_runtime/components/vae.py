"""Loads the VAE."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.reader import BytesRead, load_weights, nbytes
from ..models.shared.vae import VideoVae
from ..ops.precision import check_strict
from ..recognition.component import Component
from ..recognition.layout import find_vae
from ..specs import VaeSpec
from .networks import dtype_named, empty_network
from .room import Room


def files(spec: VaeSpec) -> list[Component]:
    return [find_vae(spec.path)]


def load(spec: VaeSpec, found: list[Component], room: Room, progress: BytesRead) -> VideoVae:
    dtype = _dtype(spec, room.device)
    (component,) = found
    network = empty_network(component)
    places = component.places_in(network)
    progress.expect(nbytes(places))
    load_weights(network, places, dtype_of=lambda name: dtype, device=room.device, on_bytes=progress.add)
    return component.family.vae(network.eval(), component.family.vae_form(component.config))


def networks(component: VideoVae) -> list[nn.Module]:
    return [component.network]


def _dtype(spec: VaeSpec, device: torch.device) -> torch.dtype:
    """The dtype of weights and frames. On NPUs "auto" is bfloat16, as in the systems that run Wan there: convolutions
    and layout changes are slow in float32 (vLLM-Omni, pull request 2391; hicann/cann-recipes-infer,
    models/wan2.2-i2v/wan/image2video.py). Raises ValueError, see `check_strict`."""
    if spec.strict:
        check_strict(device)
        return torch.float32
    return dtype_named(spec.dtype, torch.bfloat16 if device.type == "npu" else torch.float32)
