"""Builds the Wan networks on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ...parallel.tensor import TensorParallel, WholeWeights
from ..family import TEXT_ENCODER, TRANSFORMER
from ..shared.networks import accepted
from .transformer import WanTransformer

# Only these fields of a text encoder's config are passed to transformers; with others it could download and run
# kernels, quantizers or code of the folder.
ENCODER = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
           "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor",
           "feed_forward_proj", "pad_token_id", "eos_token_id", "tie_word_embeddings")  # fmt: skip


def empty(part: str, config: Mapping[str, Any], tp: TensorParallel | None) -> nn.Module:
    if part == TRANSFORMER:
        return WanTransformer(dict(config), tp or WholeWeights())
    with torch.device("meta"):
        if part != TEXT_ENCODER:
            return AutoencoderKLWan.from_config(accepted(config, AutoencoderKLWan))
        model = UMT5EncoderModel(UMT5Config.from_dict({key: config[key] for key in ENCODER if key in config}))
        model.set_input_embeddings(model.shared)  # one shared module: FSDP2 gathers each module's own parameters
        return model
