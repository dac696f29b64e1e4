"""Builds the HunyuanVideo networks on the meta device, without weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import nn

from ...parallel.tensor import TensorParallel, WholeWeights
from ..family import TRANSFORMER, VAE
from .transformer import HunyuanVideoTransformer


def empty(part: str, config: Mapping[str, Any], tp: TensorParallel | None) -> nn.Module:
    if part == TRANSFORMER:
        return HunyuanVideoTransformer(_accepted(config, HunyuanVideoTransformer3DModel), tp or WholeWeights())
    if part == VAE:
        with torch.device("meta"):
            return AutoencoderKLHunyuanVideo.from_config(_accepted(config, AutoencoderKLHunyuanVideo))
    raise NotImplementedError(part)


def _accepted(config: Mapping[str, Any], network: type) -> dict[str, Any]:
    """The config fields that are parameters of a network class: diffusers would print the others unescaped."""
    return {key: value for key, value in config.items() if key in inspect.signature(network.__init__).parameters}
