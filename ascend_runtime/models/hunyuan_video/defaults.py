"""The default settings of the published HunyuanVideo models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..defaults import Defaults, Distillation
from .files.configs import CONCAT, REPLACE, filled

EMBEDDED_GUIDANCE = 6.0  # embedded: --embedded-cfg-scale; core ComfyUI's value too where a conditioning has none
# Of hyvideo/config.py and README.md of github.com/Tencent-Hunyuan/HunyuanVideo and HunyuanVideo-I2V. The latter
# recommend shift 7 for stable videos, with `SampleSpec.image_start`, and shift 17 for moving ones, without; diffusers'
# scheduler and core ComfyUI's workflows have 7.
TEXT = Defaults(
    "HunyuanVideo", shift=7.0, guidance_scale=1.0, embedded_guidance=EMBEDDED_GUIDANCE, solver="euler", width=1280,
    height=720, num_frames=129, fps=24,
)  # fmt: skip
IMAGE_REPLACE = dataclasses.replace(TEXT, name="HunyuanVideo-I2V")
IMAGE_CONCAT = dataclasses.replace(TEXT, name="HunyuanVideo-I2V (33 channels)")
# scripts/inference/inference_fasthunyuan.yaml of hao-ai-lab/FastVideo.
DISTILLATIONS = (Distillation("FastHunyuan", r"fast[-_ ]?hunyuan|hunyuan.*fastvideo", 6, shift=17.0),)


def defaults_of(config: Mapping[str, Any]) -> Defaults:
    """The defaults of the published model whose transformer has this config (diffusers'
    HunyuanVideoTransformer3DModel)."""
    config = filled(config)
    published = {CONCAT: IMAGE_CONCAT, REPLACE: IMAGE_REPLACE}.get(config["image_condition_type"], TEXT)
    return published if config["guidance_embeds"] else dataclasses.replace(published, embedded_guidance=None)


def sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """The authors' schedule: evenly spaced from 1 to 0, then shifted (scheduling_flow_match_discrete.py there). In
    fp32, as theirs and diffusers': a network's sinusoid shows the last bit of 1000 times a sigma."""
    import numpy as np  # commands that list published models answer without it

    times = np.linspace(1, 0, steps + 1).astype(np.float32)
    return tuple(map(float, shift * times / (1 + (shift - 1) * times)))
