"""diffusers' pipelines of the HunyuanVideo models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...family import TEXT_ENCODER, TRANSFORMER, VAE, DiffusersPipeline
from ..defaults import defaults_of
from .configs import REPLACE, filled, is_open

SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
TEXT_PARTS = {
    TEXT_ENCODER: ("transformers", "LlamaModel"),
    # Published pipelines name LlamaTokenizerFast, which in release 5 of transformers drops spaces.
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "text_encoder_2": ("transformers", "CLIPTextModel"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
FROM_IMAGE = {TEXT_ENCODER: ("transformers", "LlavaForConditionalGeneration"),
              "image_processor": ("transformers", "CLIPImageProcessor")}  # fmt: skip
PIPELINE_PARTS = {
    "scheduler": ("diffusers", SCHEDULER_CLASS),
    **TEXT_PARTS,
    TRANSFORMER: ("diffusers", "HunyuanVideoTransformer3DModel"),
    VAE: ("diffusers", "AutoencoderKLHunyuanVideo"),
}
OPEN_KIND = (
    f"image_condition_type: the source does not say whether the model makes videos from text only, or from images too, "
    f"so its config says from text. If it is HunyuanVideo-I2V (v2), set it to {REPLACE} in "
    "transformer/config.json, and _class_name to HunyuanVideoImageToVideoPipeline in model_index.json"
)


def pipeline_of(configs: Mapping[str, Mapping[str, Any]]) -> DiffusersPipeline:
    """The pipeline of networks with these configs, by folder name."""
    if TRANSFORMER not in configs:
        return DiffusersPipeline("HunyuanVideoPipeline", PIPELINE_PARTS)
    config = filled(configs[TRANSFORMER])
    from_image = config["image_condition_type"] is not None
    return DiffusersPipeline(
        class_name="HunyuanVideoImageToVideoPipeline" if from_image else "HunyuanVideoPipeline",
        classes=PIPELINE_PARTS | (FROM_IMAGE if from_image else {}),
        scheduler={
            "_class_name": SCHEDULER_CLASS,
            "num_train_timesteps": 1000,
            "shift": defaults_of(configs[TRANSFORMER]).shift,
            "use_dynamic_shifting": False,
        },
        left_out=(OPEN_KIND,) if is_open(configs[TRANSFORMER]) else (),
    )
