"""Loads the text encoders of a model, each with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoints.reader import BytesRead, Places, load_weights, nbytes
from ..errors import coded_error
from ..hardware import cores, devices, memory
from ..models.shared.text import Encoder, Encoders, TextEncoding
from ..models.shared.tokenizers import Tokenizer
from ..parallel.fsdp import ShardedWeights
from ..planner.models import SMALL_ENCODER
from ..recognition.component import Component
from ..recognition.text_encoders import find_text_encoders
from ..specs import TextEncoderSpec, VisionSpec
from .networks import dtype_named, empty_network
from .room import Room


@dataclass(frozen=True)
class TextEncoders:
    """warnings: about their speed, for the user."""

    encoding: TextEncoding
    encoders: Encoders
    warnings: list[str] = field(default_factory=list)


def files(spec: TextEncoderSpec) -> list[Component]:
    return find_text_encoders(spec)


def load(spec: TextEncoderSpec, found: list[Component], room: Room, progress: BytesRead) -> TextEncoders:
    """With placement "ranks": on this rank's device, whole or sharded. Else: whole, on the CPU."""
    device = device_of(spec, room)
    encoding = found[0].family.text()
    tokenizers = [find_tokenizer(one) for one in found]  # first, to report a missing one before weights are read
    networks = [empty_network(one) for one in found]
    for component, tokenizer, network in zip(found, tokenizers, networks):
        check_size(tokenizer, network, component)
    places = [one.places_in(network) for one, network in zip(found, networks)]
    progress.expect(sum(map(nbytes, places)))
    warnings = []
    for component, network, held in zip(found, networks, places):
        units = encoding.units(component.kind.name, network)
        warnings += load_encoder(network, held, spec, Held(device, room, units), progress)
    encoders = {one.kind.name: Encoder(network.eval(), tokenizer)
                for one, network, tokenizer in zip(found, networks, tokenizers)}  # fmt: skip
    return TextEncoders(encoding, encoders, warnings)


def networks(component: TextEncoders) -> list[nn.Module]:
    return [encoder.model for encoder in component.encoders.values()]


def device_of(spec: TextEncoderSpec | VisionSpec, room: Room) -> torch.device:
    return room.device if spec.placement == "ranks" else torch.device("cpu")


@dataclass(frozen=True)
class Held:
    """Where a network's weights are kept. units: see `parallel.fsdp.ShardedWeights`."""

    device: torch.device
    room: Room
    units: list[nn.Module]


def load_encoder(
    network: nn.Module, places: Places, spec: TextEncoderSpec | VisionSpec, held: Held, progress: BytesRead
) -> list[str]:
    """Loads an encoder's weights. Returns warnings about its speed."""
    automatic, slow = _text_dtype(held.device, nbytes(places), network)
    dtype = dtype_named(spec.dtype, automatic)
    load_weights(
        network,
        places,
        dtype_of=lambda name: dtype,
        device=held.device,
        share=ShardedWeights(held.room.sharding, lambda name: None, lambda name: False, held.units),
        on_bytes=progress.add,
    )
    return [slow] if slow and spec.dtype == "auto" else []


def find_tokenizer(component: Component) -> Tokenizer:
    """Raises ValueError if there is none."""
    return component.family.text().tokenizer(component.kind.name, component.tokenizer, component.shards[0])


def check_size(tokenizer: Tokenizer, network: nn.Module, component: Component) -> None:
    """Raises ValueError for a tokenizer with more tokens than the text encoder has embeddings."""
    encoding = component.family.text()
    known = encoding.embeddings_in(component.kind.name, network)
    if tokenizer.size > known:
        raise coded_error(
            "AV-1410",
            f"{component.tokenizer} has {tokenizer.size} tokens, but the text encoder {component.shards[0]} has "
            f"embeddings for {known}: the tokenizer belongs to another model. {encoding.advice(component.kind.name)}",
        )


def _text_dtype(device: torch.device, nbytes: int, network: nn.Module) -> tuple[torch.dtype, str | None]:
    """The default dtype of an encoder, and a warning if it is slow. nbytes: on disk. network: on the meta device."""
    if device.type != "cpu" or (nbytes >= SMALL_ENCODER and cores.compute_bfloat16()):
        return torch.bfloat16, None
    needed, available = 4 * sum(p.numel() for p in network.parameters()), devices.host_memory()
    if nbytes < SMALL_ENCODER or needed <= available - memory.ROOM:
        return torch.float32, None
    return torch.bfloat16, (
        "The text encoder is slow: this host's CPU has no bfloat16 instructions, and float32 would take "
        f"{needed / 1e9:.1f} GB of its memory, of which {available / 1e9:.1f} GB are available and "
        f"{memory.ROOM / 1e9:.1f} GB must stay free. Set its placement to 'ranks', or free memory and set its dtype to "
        "'float32'."
    )
