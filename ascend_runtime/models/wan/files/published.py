"""The configs of the published Wan models, as in the config.json of their folders on Hugging Face."""

from __future__ import annotations

from ...family import TEXT_ENCODER, VAE
from ...hubs import PublishedModel
from ..latents import CHANNELS_22, LATENTS_MEAN_22, LATENTS_STD_22
from .configs import MASK_CHANNELS, TRANSFORMER_DEFAULTS

UMT5_XXL = {"model_type": "umt5", "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240,
            "num_layers": 24, "relative_attention_num_buckets": 32, "dropout_rate": 0.0}  # fmt: skip
VAE_21 = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
          "temperal_downsample": [False, True, True]}  # fmt: skip
VAE_22 = {
    **VAE_21, "base_dim": 160, "decoder_base_dim": 256, "z_dim": CHANNELS_22, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    "latents_mean": list(LATENTS_MEAN_22), "latents_std": list(LATENTS_STD_22),
}  # fmt: skip
OF_14B = {**TRANSFORMER_DEFAULTS, "cross_attn_norm": True, "added_kv_proj_dim": None}
FROM_IMAGE = OF_14B | {"in_channels": 2 * OF_14B["out_channels"] + MASK_CHANNELS}
WITH_CLIP = FROM_IMAGE | {"image_dim": 1280, "added_kv_proj_dim": 5120}
OF_1_3B = OF_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
OF_5B = OF_14B | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": CHANNELS_22,
                  "out_channels": CHANNELS_22}  # fmt: skip


def _published(vae: dict, *transformers: dict) -> PublishedModel:
    return PublishedModel(transformers, {TEXT_ENCODER: UMT5_XXL, VAE: vae})


PUBLISHED_MODELS = {
    "Wan2.1-T2V-1.3B": _published(VAE_21, OF_1_3B),
    "Wan2.1-T2V-14B": _published(VAE_21, OF_14B),
    "Wan2.1-I2V-14B": _published(VAE_21, WITH_CLIP),
    "Wan2.1-FLF2V-14B": _published(VAE_21, WITH_CLIP | {"pos_embed_seq_len": 514}),
    "Wan2.2-T2V-A14B": _published(VAE_21, OF_14B, OF_14B),
    "Wan2.2-I2V-A14B": _published(VAE_21, FROM_IMAGE, FROM_IMAGE),
    "Wan2.2-TI2V-5B": _published(VAE_22, OF_5B),
}
