"""Loads the VAE."""

from __future__ import annotations

import torch

from ..checkpoints.reader import BytesRead, load_weights, nbytes
from ..models.shared.vae import VideoVae
from ..recognition.component import Component
from ..recognition.layout import find_vae
from ..specs import VaeSpec
from .networks import dtype_named, empty_network
from .room import Room


def files(spec: VaeSpec) -> list[Component]:
    return [find_vae(spec.path)]


def load(spec: VaeSpec, found: list[Component], room: Room, progress: BytesRead) -> VideoVae:
    (component,) = found
    network = empty_network(component)
    places = component.places_in(network)
    progress.expect(nbytes(places))
    dtype = dtype_named(spec.dtype, torch.float32)
    load_weights(network, places, dtype_of=lambda name: dtype, device=room.device, on_bytes=progress.add)
    return component.family.vae(network.eval(), component.family.vae_form(component.config))
