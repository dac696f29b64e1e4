"""Networks without their weights, on the meta device, as configs describe them."""

from __future__ import annotations

import inspect

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ..accelerate.quantized import quantize
from ..checkpoints.configs import check_counts
from ..checkpoints.faults import usable
from ..checkpoints.fused import targets_of
from ..checkpoints.layout import Component
from ..families import wan


# Of a text encoder's config only what an encoder computes with goes to transformers, which takes other entries as what
# to fetch and run: kernels, quantizers, code of the folder's own.
ENCODER = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
           "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor",
           "feed_forward_proj", "pad_token_id", "eos_token_id", "tie_word_embeddings")  # fmt: skip


def empty_network(kind: str, component: Component) -> torch.nn.Module:
    """The network of a "transformer", "text_encoder" or "vae", on the meta device. Raises ValueError where there is
    none of this config."""
    told_by = component.folder / "config.json" if component.folder else component.shards[0]
    check_counts(component.config, told_by)
    with usable(told_by, f"its config of a {kind}"):
        network = _network(kind, component.config)
    return as_described(network, component)


def _network(kind: str, config: dict) -> torch.nn.Module:
    if kind == "transformer":
        return wan.WanTransformer(transformer_parameters(config))
    with torch.device("meta"):
        if kind == "vae":
            return AutoencoderKLWan.from_config(_known(config, AutoencoderKLWan))
        model = UMT5EncoderModel(UMT5Config.from_dict({key: config[key] for key in ENCODER if key in config}))
        model.set_input_embeddings(model.shared)  # one module twice: FSDP2 gathers a module's own parameters
        return model


def transformer_parameters(config: dict) -> dict:
    """What of a transformer's config is for its network."""
    return _known(config, WanTransformer3DModel)


def _known(config: dict, network: type) -> dict:
    """What of a config is a parameter of a network: diffusers would print the rest as it is."""
    return {key: value for key, value in config.items() if key in inspect.signature(network.__init__).parameters}


def as_described(network: nn.Module, component: Component) -> nn.Module:
    """`network`, with quantized layers where the component's description says so."""
    if component.quantized is not None:
        quantize(network, component.quantized.renamed(lambda name: _parameters(component, name)))
    return network


def _parameters(component: Component, name: str) -> list[str]:
    """The network's names of what a tensor of this name holds."""
    return [one.name for one in targets_of(component.split, component.rename(name, component.shards[0]), ())]


def dtype_named(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)
