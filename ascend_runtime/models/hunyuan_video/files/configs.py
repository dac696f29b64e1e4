"""Builds the configs of the HunyuanVideo networks from tensor shapes if there is no config.json, and checks configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....checkpoints.faults import shown
from ....errors import coded_error
from ...shapes import Shapes, count
from ..latents import CHANNELS, SCALING, SPATIAL, TEMPORAL
from .variants import USE, USE_VAE, of_channels

# diffusers' defaults for omitted fields of HunyuanVideoTransformer3DModel's config.
TRANSFORMER_DEFAULTS = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
    "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56), "image_condition_type": None,
}  # fmt: skip
CONCAT, REPLACE = "latent_concat", "token_replace"  # image_condition_type in diffusers' configs; None: text to video
# What a network says for a config without the field: its shapes are those of a text-to-video model and of one that
# replaces the first frame. A job decides: the conditioning of an image-to-video one has a guiding frame.
EITHER = "either"
GUIDING_FRAME = "guiding_frame_index"  # of a conditioning: the frame that is known and replaced, always 0
HEAD_DIM = 128  # of every published HunyuanVideo transformer
CONDITION_TYPES = (None, REPLACE, CONCAT)
DOUBLE, SINGLE, REFINER = (
    "transformer_blocks.", "single_transformer_blocks.", "context_embedder.token_refiner.refiner_blocks."
)  # fmt: skip
TRANSFORMER_SIGNATURE = {
    f"{REFINER}0.norm1.weight": 1,
    "context_embedder.proj_in.weight": 2,
    f"{DOUBLE}0.attn.to_q.weight": 2,
    f"{DOUBLE}0.attn.norm_q.weight": 1,
    f"{SINGLE}0.attn.to_q.weight": 2,
    "x_embedder.proj.weight": 5,
    "proj_out.weight": 2,
    "time_text_embed.text_embedder.linear_1.weight": 2,
}
# Fields that shapes do not show, with the values of all published models; see `transformer_config` for two more.
HIDDEN = {"qk_norm": "rms_norm", "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56), "image_condition_type": None}


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config with defaults for omitted fields."""
    return {**TRANSFORMER_DEFAULTS, **config}


def width_of(config: Mapping[str, Any]) -> int:
    """The number of channels of a token."""
    config = filled(config)
    return config["num_attention_heads"] * config["attention_head_dim"]


def transformer_config(shapes: Shapes) -> dict:
    """The config of diffusers' HunyuanVideoTransformer3DModel.

    A model that reads 16 channels has no image_condition_type: it makes videos from text only, or from images by
    replacing tokens, and the two have equal shapes. Raises ValueError if the shapes do not fit each other.
    """
    dim, in_channels, frames, height, width = shapes["x_embedder.proj.weight"]
    (head_dim,) = shapes[f"{DOUBLE}0.attn.norm_q.weight"]
    if dim % head_dim or head_dim % 2:
        raise ValueError(f"it has {dim} channels, which are not whole heads of {head_dim}")
    if height != width:
        raise ValueError(f"x_embedder.proj.weight reads patches of {height} x {width}; they must be square")
    out_channels = shapes["proj_out.weight"][0] // (frames * height * width)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count(shapes, DOUBLE),
        "num_single_layers": count(shapes, SINGLE),
        "num_refiner_layers": count(shapes, REFINER),
        "patch_size": height,
        "patch_size_t": frames,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_axes_dim": rope_axes(head_dim),
        **({"image_condition_type": CONCAT} if in_channels == 2 * out_channels + 1 else {}),
    }


def is_open(config: Mapping[str, Any]) -> bool:
    """Whether a config leaves open if a model makes videos from text only, or from images too: one that was read off
    shapes, which do not show it, or that diffusers wrote before it knew the field."""
    return "image_condition_type" not in config


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """The channels of a head that are turned by a token's frame, row and column: about 1/8, 7/16 and 7/16 of them, as
    in the published models, each an even number."""
    side = 2 * (7 * head_dim // 32)
    return head_dim - 2 * side, side, side


def check_transformers(configs: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Raises ValueError if these are not the one transformer of a supported model."""
    if len(configs) > 1:
        raise coded_error(
            "AV-1403", f"{files[1]} is given as a second expert, but HunyuanVideo models have one. Give one file."
        )
    config, file = filled(configs[0]), files[0]
    if wrong := of_channels(config["in_channels"]):
        raise coded_error("AV-1311", f"{file} cannot be used. {wrong}")
    kind, reads, makes = (config[name] for name in ("image_condition_type", "in_channels", "out_channels"))
    if kind not in CONDITION_TYPES:
        known = ", ".join(map(str, CONDITION_TYPES))
        raise coded_error("AV-1311", f"{file} says image_condition_type {shown(repr(kind))}; it can be one of {known}.")
    expected = 2 * makes + 1 if kind == CONCAT else makes
    if reads != expected:
        raise coded_error(
            "AV-1311",
            f"{file} reads {reads} channels and makes {makes}; with image_condition_type {kind} it must read "
            f"{expected}. {USE}",
        )
    for name, value in (("qk_norm", "rms_norm"), ("mlp_ratio", 4)):
        if config[name] != value:
            raise coded_error(
                "AV-1311", f"{file} says {name} {shown(repr(config[name]))}; only {value} is supported. {USE}"
            )
    axes, head_dim = config["rope_axes_dim"], config["attention_head_dim"]
    whole = isinstance(axes, (list, tuple)) and all(type(one) is int and one > 0 and one % 2 == 0 for one in axes)
    if not (whole and len(axes) == 3 and sum(axes) == head_dim):
        raise coded_error(
            "AV-1309",
            f"{file} says rope_axes_dim {shown(repr(axes))}; it must be 3 even numbers whose sum is {head_dim}, the "
            "channels of a head. Download it again.",
        )


VAE_SIGNATURE = {
    "encoder.conv_in.conv.weight": 5,
    "decoder.conv_in.conv.weight": 5,
    "encoder.mid_block.attentions.0.to_q.weight": 2,
    "encoder.conv_out.conv.weight": 5,
    "decoder.conv_out.conv.weight": 5,
}
VAE_LEVELS = 4
CONV_1 = "encoder.down_blocks.{}.resnets.0.conv1.conv.weight"
# Fields of AutoencoderKLHunyuanVideo's config for which only diffusers' default is supported.
VAE_FIXED = {"norm_num_groups": 32, "spatial_compression_ratio": SPATIAL, "temporal_compression_ratio": TEMPORAL,
             "act_fn": "silu", "mid_block_add_attention": True}  # fmt: skip


def vae_config(shapes: Shapes) -> dict:
    """The config of diffusers' AutoencoderKLHunyuanVideo."""
    base, in_channels = shapes["encoder.conv_in.conv.weight"][:2]
    levels = count(shapes, "encoder.down_blocks.")
    return {
        "in_channels": in_channels,
        "out_channels": shapes["decoder.conv_out.conv.weight"][0],
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        # a missing level is reported later
        "block_out_channels": [shapes.get(CONV_1.format(level), (base,))[0] for level in range(levels)],
        "layers_per_block": count(shapes, "encoder.down_blocks.0.resnets."),
        "scaling_factor": SCALING,
        **VAE_FIXED,
    }


def check_vae_config(config: dict, file: Path) -> None:
    """Raises ValueError for the config of a VAE that is not HunyuanVideo's."""
    latents = config.get("latent_channels", CHANNELS)
    colours = config.get("in_channels", 3), config.get("out_channels", 3)
    if colours != (3, 3):
        raise coded_error("AV-1311", f"{file} reads {colours[0]} channels and makes {colours[1]}; RGB has 3. {USE_VAE}")
    for name, value in VAE_FIXED.items():
        if config.get(name, value) != value:
            raise coded_error(
                "AV-1311", f"{file} says {name} {shown(repr(config[name]))}; only {value} is supported. {USE_VAE}"
            )
    levels = config.get("block_out_channels", (128, 256, 512, 512))
    if not isinstance(levels, (list, tuple)) or len(levels) != VAE_LEVELS:
        raise coded_error(
            "AV-1311", f"{file} has block_out_channels {shown(repr(levels))}; it must have {VAE_LEVELS}. {USE_VAE}"
        )
    if latents != CHANNELS:
        raise coded_error(
            "AV-1311", f"{file} makes latents of {shown(repr(latents))} channels, not {CHANNELS}. {USE_VAE}"
        )
