"""diffusers' pipelines of the Wan models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...family import TEXT_ENCODER, TRANSFORMER, VAE, DiffusersPipeline
from ..defaults import defaults_of
from ..latents import CHANNELS_22
from .configs import REFERENCE_CHANNELS, filled, reads_control

SCHEDULER_CLASS = "UniPCMultistepScheduler"
PIPELINE_PARTS = {
    "scheduler": ("diffusers", SCHEDULER_CLASS),
    TEXT_ENCODER: ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    TRANSFORMER: ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    VAE: ("diffusers", "AutoencoderKLWan"),
}
CLIP = "image_encoder: CLIP is not converted; add one to diffusers' pipeline"
CONTROL = "pipeline: diffusers has none for Fun Control models; use the folder with this pack"


def pipeline_of(configs: Mapping[str, Mapping[str, Any]]) -> DiffusersPipeline:
    """The pipeline of networks with these configs, by folder name."""
    if TRANSFORMER not in configs:
        return DiffusersPipeline("WanPipeline", PIPELINE_PARTS)
    experts = sum(name.startswith(TRANSFORMER) for name in configs)
    config, own = filled(configs[TRANSFORMER]), defaults_of(configs[TRANSFORMER], experts)
    from_image = config["in_channels"] != config["out_channels"]
    left_out = [CLIP] if config["image_dim"] else []
    left_out += [CONTROL] if reads_control(config) or config.get(REFERENCE_CHANNELS) else []
    return DiffusersPipeline(
        class_name="WanImageToVideoPipeline" if from_image else "WanPipeline",
        classes=PIPELINE_PARTS | (dict.fromkeys(("image_encoder", "image_processor")) if from_image else {}),
        settings={
            "boundary_ratio": own.boundary,
            "expand_timesteps": config["out_channels"] == CHANNELS_22 and not from_image,
        },
        scheduler={
            "_class_name": SCHEDULER_CLASS,
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": own.shift,
        },
        left_out=tuple(left_out),
    )
