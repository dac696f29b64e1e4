"""Networks without their weights, on the meta device, as configs describe them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ..accelerate.quantized import quantize
from ..checkpoints.faults import usable
from ..checkpoints.layout import Component
from ..families import wan


def empty_network(kind: str, component: Component) -> torch.nn.Module:
    """The network of a "transformer", "text_encoder" or "vae", on the meta device. Raises ValueError where there is
    none of this config."""
    told_by = component.folder / "config.json" if component.folder else component.shards[0]
    with usable(told_by, f"its config of a {kind}"):
        network = _network(kind, component.config)
    return as_described(network, component)


def _network(kind: str, config: dict) -> torch.nn.Module:
    if kind == "transformer":
        return wan.WanTransformer(config)
    with torch.device("meta"):
        if kind == "vae":
            return AutoencoderKLWan.from_config(config)
        model = UMT5EncoderModel(UMT5Config.from_dict(config))
        model.set_input_embeddings(model.shared)  # one module twice: FSDP2 gathers a module's own parameters
        return model


def as_described(network: nn.Module, component: Component) -> nn.Module:
    """`network`, with quantized layers where the component's description says so."""
    if component.quantized is not None:
        quantize(network, component.quantized.renamed(lambda name: component.rename(name, component.shards[0])))
    return network


def dtype_named(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)
