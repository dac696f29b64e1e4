"""The configs of the published HunyuanVideo models, as in the config.json of their folders on Hugging Face."""

from __future__ import annotations

from ...family import TEXT_ENCODER, TEXT_ENCODER_2, VAE, VISION
from ...hubs import PublishedModel
from ..latents import CHANNELS, SCALING
from .configs import CONCAT, REPLACE, TRANSFORMER_DEFAULTS, VAE_FIXED

LLAMA_8B = {"model_type": "llama", "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5}  # fmt: skip
CLIP_L = {"model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
          "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}  # fmt: skip
LLAVA_TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
               "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
VIDEO_VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": CHANNELS, "layers_per_block": 2,
             "block_out_channels": [128, 256, 512, 512], "scaling_factor": SCALING, **VAE_FIXED}  # fmt: skip
FROM_TEXT = {TEXT_ENCODER: LLAMA_8B, TEXT_ENCODER_2: CLIP_L, VAE: VIDEO_VAE}
WITH_IMAGE = FROM_TEXT | {VISION: LLAVA_TOWER}

PUBLISHED_MODELS = {
    "HunyuanVideo": PublishedModel((TRANSFORMER_DEFAULTS,), FROM_TEXT),
    "HunyuanVideo-I2V-v1": PublishedModel(
        (TRANSFORMER_DEFAULTS | {"in_channels": 2 * CHANNELS + 1, "guidance_embeds": False,
                                 "image_condition_type": CONCAT},),
        WITH_IMAGE,
    ),
    "HunyuanVideo-I2V-v2": PublishedModel((TRANSFORMER_DEFAULTS | {"image_condition_type": REPLACE},), WITH_IMAGE),
}  # fmt: skip
