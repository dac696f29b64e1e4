"""Loads the vision tower that reads the images of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..checkpoints.reader import BytesRead, nbytes
from ..models.family import VISION
from ..recognition.component import Component
from ..recognition.text_encoders import find_vision
from ..specs import VisionSpec
from .networks import empty_network
from .room import Room
from .text_encoder import Held, device_of, load_encoder


@dataclass(frozen=True)
class VisionTower:
    """warnings: about its speed, for the user."""

    model: nn.Module
    warnings: list[str] = field(default_factory=list)


def files(spec: VisionSpec) -> list[Component]:
    return [find_vision(spec)]


def networks(component: VisionTower) -> list[nn.Module]:
    return [component.model]


def load(spec: VisionSpec, found: list[Component], room: Room, progress: BytesRead) -> VisionTower:
    """With the placement of the text encoders."""
    (component,) = found
    network = empty_network(component)
    places = component.places_in(network)
    progress.expect(nbytes(places))
    units = component.family.text().units(VISION, network)
    warnings = load_encoder(network, places, spec, Held(device_of(spec, room), room, units), progress)
    return VisionTower(network.eval(), warnings)
