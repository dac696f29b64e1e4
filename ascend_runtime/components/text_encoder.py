"""Loads the text encoders of a model, each with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoints.reader import BytesRead, load_weights, nbytes
from ..checkpoints.tokenizers import TOKENIZER_ADVICE
from ..hardware import cores, devices, memory
from ..models.shared.text import Encoder, Encoders, TextEncoding
from ..models.shared.tokenizers import Tokenizer
from ..parallel.fsdp import ShardedWeights
from ..recognition.component import Component
from ..recognition.layout import find_text_encoders
from ..specs import TextEncoderSpec
from .networks import dtype_named, empty_network
from .room import Room

SMALL = 2**30  # bytes on disk; on a CPU, a smaller text encoder computes in fp32


@dataclass(frozen=True)
class TextEncoders:
    """warnings: about their speed, for the user."""

    encoding: TextEncoding
    encoders: Encoders
    warnings: list[str] = field(default_factory=list)


def files(spec: TextEncoderSpec) -> list[Component]:
    return find_text_encoders(spec.path)


def load(spec: TextEncoderSpec, found: list[Component], room: Room, progress: BytesRead) -> TextEncoders:
    """With placement "ranks": on this rank's device, whole or sharded. Else: whole, on the CPU."""
    device = room.device if spec.placement == "ranks" else torch.device("cpu")
    encoding = found[0].family.text()
    tokenizers = [find_tokenizer(one) for one in found]  # first, to report a missing one before weights are read
    networks = [empty_network(one) for one in found]
    for component, tokenizer, network in zip(found, tokenizers, networks):
        check_size(tokenizer, network, component)
    places = [one.places_in(network) for one, network in zip(found, networks)]
    progress.expect(sum(map(nbytes, places)))
    warnings = []
    for component, network, held in zip(found, networks, places):
        automatic, slow = _text_dtype(device, component.nbytes, network)
        dtype = dtype_named(spec.dtype, automatic)
        warnings += [slow] if slow and spec.dtype == "auto" else []
        units = encoding.units(component.kind.name, network)
        load_weights(
            network,
            held,
            dtype_of=lambda name, dtype=dtype: dtype,
            device=device,
            share=ShardedWeights(room.sharding, lambda name: None, lambda name: False, units),
            on_bytes=progress.add,
        )
    encoders = {one.kind.name: Encoder(network.eval(), tokenizer)
                for one, network, tokenizer in zip(found, networks, tokenizers)}  # fmt: skip
    return TextEncoders(encoding, encoders, warnings)


def find_tokenizer(component: Component) -> Tokenizer:
    """Raises ValueError if there is none."""
    return component.family.text().tokenizer(component.kind.name, component.tokenizer, component.shards[0])


def check_size(tokenizer: Tokenizer, network: nn.Module, component: Component) -> None:
    """Raises ValueError for a tokenizer with more tokens than the text encoder has embeddings."""
    known = component.family.text().embeddings_in(component.kind.name, network)
    if tokenizer.size > known:
        raise ValueError(
            f"{component.tokenizer} has {tokenizer.size} tokens, but the text encoder {component.shards[0]} has "
            f"embeddings for {known}: the tokenizer belongs to another model. {TOKENIZER_ADVICE}"
        )


def _text_dtype(device: torch.device, nbytes: int, network: nn.Module) -> tuple[torch.dtype, str | None]:
    """The default dtype of an encoder, and a warning if it is slow. nbytes: on disk. network: on the meta device."""
    if device.type != "cpu" or (nbytes >= SMALL and cores.compute_bfloat16()):
        return torch.bfloat16, None
    needed, available = 4 * sum(p.numel() for p in network.parameters()), devices.host_memory()
    if nbytes < SMALL or needed <= available - memory.ROOM:
        return torch.float32, None
    return torch.bfloat16, (
        "The text encoder is slow: this host's CPU has no bfloat16 instructions, and float32 would take "
        f"{needed / 1e9:.1f} GB of its memory, of which {available / 1e9:.1f} GB are available and "
        f"{memory.ROOM / 1e9:.1f} GB must stay free. Set its placement to 'ranks', or free memory and set its dtype to "
        "'float32'."
    )
