"""Builds the configs of the Wan networks from tensor shapes if there is no config.json, and checks configs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....checkpoints.configs import is_finite_number
from ....checkpoints.faults import shown
from ....errors import coded_error
from ...shapes import Shapes, count
from ..latents import CHANNELS_22, LATENTS_MEAN_22, LATENTS_STD_22

MASK_CHANNELS = 4  # of an image-to-video model: one for each of a latent frame's 4 video frames
# diffusers' defaults for omitted fields of WanTransformer3DModel's config.
TRANSFORMER_DEFAULTS = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "image_dim": None,
    "pos_embed_seq_len": None,
}  # fmt: skip
# Our field for the channels that a Fun Control model's layer for a reference image reads, named as in VideoX-Fun's
# configs; None: the model has no such layer. diffusers does not know it.
REFERENCE_CHANNELS = "in_dim_ref_conv"
HEAD_DIM = 128  # of every published Wan transformer
# The fields of a model that makes videos from text only.
FROM_TEXT = {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
TRANSFORMER_SIGNATURE = {
    "patch_embedding.weight": 5,
    "blocks.0.ffn.net.0.proj.weight": 2,
    "proj_out.weight": 2,
    "condition_embedder.text_embedder.linear_1.weight": 2,
    "condition_embedder.time_embedder.linear_1.weight": 2,
}


def transformer_config(shapes: Shapes) -> dict:
    """The config of diffusers' WanTransformer3DModel."""
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if dim % HEAD_DIM:
        raise ValueError(f"patch_embedding.weight makes {dim} channels, which is not a multiple of {HEAD_DIM}")
    has_image = "condition_embedder.image_embedder.ff.net.0.proj.weight" in shapes
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    reference = shapes.get("ref_conv.weight")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "added_kv_proj_dim": dim if has_image else None,
        "image_dim": shapes["condition_embedder.image_embedder.norm1.weight"][0] if has_image else None,
        "pos_embed_seq_len": positions[1] if positions else None,
        **({REFERENCE_CHANNELS: reference[1]} if reference else {}),
    }


TEXT_ENCODER_SIGNATURE = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": 2,
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 2,
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": 2,
}


def text_encoder_config(shapes: Shapes) -> dict:
    """The config of transformers' UMT5EncoderModel."""
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    inner, width = shapes[f"{attention}.q.weight"]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    embedding = shapes.get("shared.weight") or shapes.get("encoder.embed_tokens.weight") or (256384,)  # reported later
    return {
        "model_type": "umt5",
        "vocab_size": embedding[0],
        "d_model": width,
        "d_kv": inner // heads,
        "num_heads": heads,
        "d_ff": shapes[f"{feed_forward}.wi_0.weight"][0],
        "num_layers": count(shapes, "encoder.block."),
        "relative_attention_num_buckets": buckets,
        "dropout_rate": 0.0,
    }


def other_text_encoder(shapes: Shapes) -> str:
    """A sentence about a text encoder that is a T5, whose blocks share the first one's position table; else empty."""
    table = re.compile(r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$")
    blocks = {int(found[1]) for found in map(table.match, shapes) if found}
    if blocks != {0} or "encoder.block.1.layer.0.SelfAttention.q.weight" not in shapes:
        return ""
    return (
        "It is a T5, such as t5xxl of Flux and SD3, but Wan uses a UMT5. Use umt5_xxl_fp8_e4m3fn_scaled.safetensors or "
        "umt5_xxl_fp16.safetensors of Comfy-Org/Wan_2.1_ComfyUI_repackaged."
    )


VAE_SIGNATURE = {
    "encoder.conv_in.weight": 5,
    "encoder.mid_block.resnets.0.conv1.weight": 5,
    "decoder.conv_out.weight": 5,
    "decoder.norm_out.gamma": 4,
    "post_quant_conv.weight": 5,
}


def vae_config(shapes: Shapes) -> dict:
    """The config of diffusers' AutoencoderKLWan, with 2 layers in each block, like both published VAEs."""
    base, channels = shapes["encoder.conv_in.weight"][:2]
    z_dim = shapes["post_quant_conv.weight"][0]
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    # The Wan 2.1 VAE numbers layers and downsamplers in one list; the 2.2 VAE nests them in blocks.
    first, step = ("{0}.resnets.0.conv1", "{0}.downsampler") if residual else ("{1}.conv1", "{2}")
    blocks = count(shapes, "encoder.down_blocks.") if residual else (count(shapes, "encoder.down_blocks.") + 1) // 3
    at = [[f"encoder.down_blocks.{name.format(n, 3 * n, 3 * n + 2)}" for n in range(blocks)] for name in (first, step)]
    temporal = [f"{name}.time_conv.weight" in shapes for name in at[1][:-1]]
    patch = math.isqrt(channels // 3)
    if channels != 3 * patch**2 or not patch:
        raise ValueError(f"encoder.conv_in.weight reads {channels} channels, which are not patches of RGB")
    config = {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0],
        "z_dim": z_dim,
        "dim_mult": [shapes.get(f"{name}.weight", (base,))[0] // base for name in at[0]],  # missing: reported later
        "num_res_blocks": 2,
        "temperal_downsample": temporal,
        "is_residual": residual,
        "in_channels": channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** (blocks - 1) * patch,
    }
    if z_dim == CHANNELS_22:
        config |= {"latents_mean": list(LATENTS_MEAN_22), "latents_std": list(LATENTS_STD_22)}
    return config


def check_colours(config: dict, where: Path) -> None:
    """Raises ValueError for the config of a VAE that does not read and make RGB, with or without patches."""
    patch = config.get("patch_size") or 1
    colours = 3 * patch**2 if type(patch) is int else None
    reads, makes = config.get("in_channels", 3), config.get("out_channels", 3)
    if (reads, makes) != (colours, colours):
        upscales = " It is a VAE that upscales videos, which is not supported." if reads == colours < makes else ""
        raise coded_error(
            "AV-1311",
            f"{where} reads {reads} channels and makes {makes}; RGB in patches of {patch} x {patch} has {colours}."
            f"{upscales} Use Wan2.1_VAE.pth or wan_2.1_vae.safetensors; for Wan2.2-TI2V-5B use Wan2.2_VAE.pth or "
            "wan2.2_vae.safetensors.",
        )


def check_vae(config: dict, where: Path) -> None:
    """Raises ValueError for the config of a VAE whose latents_mean or latents_std is invalid, or whose scale factors do
    not match its layers."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    for name, given, least in (("latents_mean", mean, -math.inf), ("latents_std", std, 0)):
        listed = isinstance(given, (list, tuple))
        if given is not None and not (listed and all(is_finite_number(one) and one > least for one in given)):
            raise coded_error(
                "AV-1309",
                f"{where} has {name} {shown(repr(given))}; it must be a list of numbers"
                f"{' above 0' if least == 0 else ''}. Download it again.",
            )
    steps, temporal = config.get("dim_mult", (1, 2, 4, 4)), config.get("temperal_downsample", (False, True, True))
    if not (isinstance(steps, (list, tuple)) and isinstance(temporal, (list, tuple)) and steps):
        return  # the network's own class reports it
    made = {"scale_factor_spatial": 2 ** (len(steps) - 1) * (config.get("patch_size") or 1),
            "scale_factor_temporal": 2 ** sum(map(bool, temporal))}  # fmt: skip
    wrong = [f"{name} {config[name]}, but its layers result in {own}" for name, own in made.items()
             if config.get(name, own) != own]  # fmt: skip
    if wrong:
        raise coded_error("AV-1309", f"{where} has {', and '.join(wrong)}. Download it again.")


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config with defaults for omitted fields."""
    return {**TRANSFORMER_DEFAULTS, **config}


def reads_control(config: Mapping[str, Any]) -> bool:
    """Whether a transformer reads a control video, as Fun Control models do: its latent, and that of an image, follow
    the noisy one, with or without a mask between them."""
    config = filled(config)
    return config["in_channels"] >= 3 * config["out_channels"]


def check_transformers(configs: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Raises ValueError unless these are the transformers of one model of a supported kind."""
    first = filled(configs[0])
    for config, file in zip(map(filled, configs), files):
        inputs, outputs = config["in_channels"], config["out_channels"]
        image, control = 2 * outputs + MASK_CHANNELS, 3 * outputs
        if inputs not in (outputs, image, control, control + MASK_CHANNELS):
            raise coded_error(
                "AV-1311",
                f"{file} reads {inputs} channels and makes {outputs}. It must read {outputs}, as a text-to-video "
                f"model, {image}, as an image-to-video model, or {control} or {control + MASK_CHANNELS}, as a Fun "
                "Control model; other kinds (camera, VACE) are not supported.",
            )
        for key in ("text_dim", "in_channels", "image_dim", REFERENCE_CHANNELS):
            if config.get(key) != first.get(key):
                has, other = config.get(key), first.get(key)
                raise coded_error(
                    "AV-1403", f"{file} has {key} {has}, but {files[0]} {other}. Use two experts of one model."
                )


def check_vae_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError for the config of an unsupported VAE."""
    check_colours(config, file)
    check_vae(config, file)
