"""The text encoders of a model, each with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoints.reader import ReadProgress, load_weights, nbytes
from ..checkpoints.tokenizers import INSTEAD
from ..hardware import devices
from ..models.shared.text import Encoder, Encoders, TextEncoding
from ..models.shared.tokenizers import Tokenizer
from ..parallel.fsdp import Sharding, Share
from ..recognition.component import Component
from ..recognition.layout import find_text_encoders
from ..specs import TextEncoderSpec
from .networks import dtype_named, empty_network

SMALL = 2**30  # bytes on disk; on a CPU, a text encoder below this is computed in fp32, a larger one in bfloat16


@dataclass(frozen=True)
class TextEncoders:
    encoding: TextEncoding
    encoders: Encoders


def files(spec: TextEncoderSpec) -> list[Component]:
    return find_text_encoders(spec.path)


def load(
    spec: TextEncoderSpec, found: list[Component], device, progress: ReadProgress, sharding: Sharding
) -> TextEncoders:
    """On this rank's device, whole or a share, where its placement is ranks; else whole on the CPU."""
    device = device if spec.placement == "ranks" else torch.device("cpu")
    encoding = found[0].family.text()
    tokenizers = [find_tokenizer(one) for one in found]  # before weights are read, as one can be missing
    networks = [empty_network(one) for one in found]
    for component, tokenizer, network in zip(found, tokenizers, networks):
        check_size(tokenizer, network, component)
    places = [one.places_in(network) for one, network in zip(found, networks)]
    progress.expect(sum(map(nbytes, places)))
    for component, network, held in zip(found, networks, places):
        dtype = dtype_named(spec.dtype, _text_dtype(device, component.nbytes))
        units = encoding.units(component.kind.name, network)
        load_weights(
            network,
            held,
            dtype_of=lambda name, dtype=dtype: dtype,
            device=device,
            share=Share(sharding, lambda name: None, lambda name: False, units),
            on_bytes=progress.add,
        )
    encoders = {one.kind.name: Encoder(network.eval(), tokenizer)
                for one, network, tokenizer in zip(found, networks, tokenizers)}  # fmt: skip
    return TextEncoders(encoding, encoders)


def find_tokenizer(component: Component) -> Tokenizer:
    """Raises ValueError where there is none."""
    return component.family.text().tokenizer(component.kind.name, component.tokenizer, component.shards[0])


def check_size(tokenizer: Tokenizer, network: nn.Module, component: Component) -> None:
    """Raises ValueError for a tokenizer with more pieces than the text encoder has embeddings."""
    known = component.family.text().embeddings_in(component.kind.name, network)
    if tokenizer.size > known:
        raise ValueError(
            f"{component.tokenizer} has {tokenizer.size} pieces, but the text encoder {component.shards[0]} knows "
            f"{known}: it is another model's tokenizer. {INSTEAD}"
        )


def _text_dtype(device: torch.device, nbytes: int) -> torch.dtype:
    """What an encoder of this size on disk computes in, where the user does not say."""
    if device.type == "cpu":
        return torch.float32 if nbytes < SMALL else torch.bfloat16
    dtype = devices.default_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype  # T5's feed-forward overflows in float16
