"""The default settings of the published HunyuanVideo models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..defaults import Defaults
from .files.configs import filled

# Of github.com/Tencent-Hunyuan/HunyuanVideo, hyvideo/config.py and README.md, and of HunyuanVideo-I2V.
TEXT = Defaults(
    "HunyuanVideo", shift=7.0, guidance_scale=1.0, width=1280, height=720, num_frames=129, fps=24
)
IMAGE_CONCAT = Defaults(
    "HunyuanVideo-I2V (33 channels)", shift=7.0, guidance_scale=1.0, width=1280, height=720, num_frames=129, fps=24
)
IMAGE_REPLACE = Defaults(
    "HunyuanVideo-I2V", shift=7.0, guidance_scale=1.0, width=1280, height=720, num_frames=129, fps=24
)


def defaults_of(config: Mapping[str, Any]) -> Defaults:
    """The defaults of the published model whose transformer has this config (diffusers'
    HunyuanVideoTransformer3DModel)."""
    kind = filled(config)["image_condition_type"]
    return {"latent_concat": IMAGE_CONCAT, "token_replace": IMAGE_REPLACE}.get(kind, TEXT)
