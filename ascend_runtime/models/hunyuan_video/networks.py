"""Builds the HunyuanVideo networks on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import nn

from ...parallel.tensor import TensorParallel, WholeWeights
from ..family import TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE, VISION
from ..shared.networks import accepted
from .text.networks import ClipText, LlamaText, LlavaVision, RmsNorm
from .text.sizes import ClipTextSizes, LlamaSizes, VisionSizes
from .transformer import HunyuanVideoTransformer

TEXT_NETWORKS = {TEXT_ENCODER: (LlamaText, LlamaSizes), TEXT_ENCODER_2: (ClipText, ClipTextSizes),
                 VISION: (LlavaVision, VisionSizes)}  # fmt: skip


def empty(part: str, config: Mapping[str, Any], tp: TensorParallel | None) -> nn.Module:
    if part == TRANSFORMER:
        return HunyuanVideoTransformer(accepted(config, HunyuanVideoTransformer3DModel), tp or WholeWeights())
    if part == VAE:
        with torch.device("meta"):
            return AutoencoderKLHunyuanVideo.from_config(accepted(config, AutoencoderKLHunyuanVideo))
    kind, sizes = TEXT_NETWORKS[part]
    with torch.device("meta"):
        return kind(sizes.of(config))


def whole(part: str, config: Mapping[str, Any]) -> nn.Module:
    """As `empty`, with the Llama's last layers and its norm."""
    if part != TEXT_ENCODER:
        return empty(part, config, None)
    with torch.device("meta"):
        llama = LlamaText(LlamaSizes.of(config), left_out=0)
        llama.norm = RmsNorm(llama.sizes.width, llama.sizes.eps)
        return llama
