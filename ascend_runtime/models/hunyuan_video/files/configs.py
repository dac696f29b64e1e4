"""Builds the configs of the HunyuanVideo networks from tensor shapes if there is no config.json, and checks configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...shapes import Shapes, count

# diffusers' defaults for omitted fields of HunyuanVideoTransformer3DModel's config.
TRANSFORMER_DEFAULTS = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
    "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56), "image_condition_type": None,
}  # fmt: skip
CONCAT, REPLACE = "latent_concat", "token_replace"  # image_condition_type in diffusers' configs; None: text to video
# The image_condition_type of weights without a config whose shapes are those of a text-to-video model and of one that
# replaces the first frame (REPLACE). A job decides: the conditioning of an image-to-video one has a guiding frame.
OPEN = "open"
GUIDING_FRAME = "guiding_frame_index"  # of a conditioning: the frame that is known and replaced, always 0
HEAD_DIM = 128  # of every published HunyuanVideo transformer
DOUBLE, SINGLE = "transformer_blocks.", "single_transformer_blocks."
TRANSFORMER_SIGNATURE = {
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight": 1,
    f"{DOUBLE}0.attn.to_q.weight": 2,
    f"{SINGLE}0.attn.to_q.weight": 2,
    "x_embedder.proj.weight": 5,
    "proj_out.weight": 2,
}


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config with defaults for omitted fields."""
    return {**TRANSFORMER_DEFAULTS, **config}


def width_of(config: Mapping[str, Any]) -> int:
    """The number of channels of a token."""
    config = filled(config)
    return config["num_attention_heads"] * config["attention_head_dim"]


def transformer_config(shapes: Shapes) -> dict:
    """The config of diffusers' HunyuanVideoTransformer3DModel."""
    dim, in_channels, frames, patch, _ = shapes["x_embedder.proj.weight"]
    head_dim = shapes.get(f"{DOUBLE}0.attn.norm_q.weight", (HEAD_DIM,))[0]
    out_channels = shapes["proj_out.weight"][0] // (frames * patch**2)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count(shapes, DOUBLE),
        "num_single_layers": count(shapes, SINGLE),
        "num_refiner_layers": count(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "patch_size": patch,
        "patch_size_t": frames,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "image_condition_type": CONCAT if in_channels == 2 * out_channels + 1 else OPEN,
    }


VAE_SIGNATURE = {"decoder.conv_in.conv.weight": 5, "encoder.conv_in.conv.weight": 5}


def vae_config(shapes: Shapes) -> dict:
    raise NotImplementedError
