"""A network's config, read off the shapes of its tensors where no config.json lies beside them."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ...checkpoints.faults import shown

Shapes = dict[str, tuple[int, ...]]  # by the names of diffusers or transformers
Tells = dict[str, int]  # names of tensors that a network has, those first that no other has, and how many dims

# How latents of the Wan 2.2 VAE are normalised (Wan-Video/Wan2.2, wan/modules/vae2_2.py); diffusers has the 2.1's.
LATENTS_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENTS_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

HEAD_DIM = 128  # of every Wan transformer of the original
TRANSFORMER_TELLS = {
    "patch_embedding.weight": 5,
    "blocks.0.ffn.net.0.proj.weight": 2,
    "proj_out.weight": 2,
    "condition_embedder.text_embedder.linear_1.weight": 2,
    "condition_embedder.time_embedder.linear_1.weight": 2,
}


def transformer_config(shapes: Shapes) -> dict:
    """That of diffusers' WanTransformer3DModel."""
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if dim % HEAD_DIM:
        raise ValueError(f"patch_embedding.weight makes {dim} channels, which are no heads of {HEAD_DIM}")
    has_image = "condition_embedder.image_embedder.ff.net.0.proj.weight" in shapes
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
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
    }


TEXT_ENCODER_TELLS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": 2,
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 2,
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": 2,
}


def text_encoder_config(shapes: Shapes) -> dict:
    """That of transformers' UMT5EncoderModel."""
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    inner, width = shapes[f"{attention}.q.weight"]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    embedding = shapes.get("shared.weight") or shapes.get("encoder.embed_tokens.weight") or (256384,)  # told later
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
    """That a text encoder is a T5, whose blocks share the first one's table of positions; empty where it is none."""
    table = re.compile(r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$")
    blocks = {int(found[1]) for found in map(table.match, shapes) if found}
    if blocks != {0} or "encoder.block.1.layer.0.SelfAttention.q.weight" not in shapes:
        return ""
    return (
        "It is a T5, such as t5xxl of Flux and SD3; Wan's is a UMT5. Take umt5_xxl_fp8_e4m3fn_scaled.safetensors or "
        "umt5_xxl_fp16.safetensors of Comfy-Org/Wan_2.1_ComfyUI_repackaged."
    )


VAE_TELLS = {
    "encoder.conv_in.weight": 5,
    "encoder.mid_block.resnets.0.conv1.weight": 5,
    "decoder.conv_out.weight": 5,
    "decoder.norm_out.gamma": 4,
    "post_quant_conv.weight": 5,
}


def vae_config(shapes: Shapes) -> dict:
    """That of diffusers' AutoencoderKLWan, with 2 layers a block as both published ones have."""
    base, channels = shapes["encoder.conv_in.weight"][:2]
    z_dim = shapes["post_quant_conv.weight"][0]
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    # The Wan 2.1 VAE counts layers and steps down in one row, the 2.2 blocks with both.
    first, step = ("{0}.resnets.0.conv1", "{0}.downsampler") if residual else ("{1}.conv1", "{2}")
    blocks = count(shapes, "encoder.down_blocks.") if residual else (count(shapes, "encoder.down_blocks.") + 1) // 3
    at = [[f"encoder.down_blocks.{name.format(n, 3 * n, 3 * n + 2)}" for n in range(blocks)] for name in (first, step)]
    temporal = [f"{name}.time_conv.weight" in shapes for name in at[1][:-1]]
    patch = math.isqrt(channels // 3)
    if channels != 3 * patch**2 or not patch:
        raise ValueError(f"encoder.conv_in.weight reads {channels} channels, which are no patches of RGB")
    config = {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0],
        "z_dim": z_dim,
        "dim_mult": [shapes.get(f"{name}.weight", (base,))[0] // base for name in at[0]],  # missing ones are told later
        "num_res_blocks": 2,
        "temperal_downsample": temporal,
        "is_residual": residual,
        "in_channels": channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** (blocks - 1) * patch,
    }
    if z_dim == len(LATENTS_MEAN_22):
        config |= {"latents_mean": list(LATENTS_MEAN_22), "latents_std": list(LATENTS_STD_22)}
    return config


def check_colours(config: dict, where: Path) -> None:
    """Raises ValueError for the config of a VAE which does not read and make RGB, in patches or not."""
    patch = config.get("patch_size") or 1
    colours = 3 * patch**2 if type(patch) is int else None
    reads, makes = config.get("in_channels", 3), config.get("out_channels", 3)
    if (reads, makes) != (colours, colours):
        enlarges = " It is a VAE that enlarges videos, which is not done here." if reads == colours < makes else ""
        raise ValueError(
            f"{where} reads {reads} channels and makes {makes}; of RGB in patches of {patch} x {patch} there are "
            f"{colours}.{enlarges} Take Wan2.1_VAE.pth or wan_2.1_vae.safetensors; for Wan2.2-TI2V-5B take "
            "Wan2.2_VAE.pth or wan2.2_vae.safetensors."
        )


# What our own code reads of a config, and reckons with.
COUNTS = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
          "ffn_dim", "z_dim", "scale_factor_spatial", "scale_factor_temporal", "rope_max_seq_len")  # fmt: skip
EPSILONS = ("eps", "layer_norm_epsilon")  # added to what a norm divides by
# A network is built before its weights are compared with those on disk, and a config is quick to write: what makes a
# part of it, and what makes a table that is no weight, has a bound. Published ones have a fifth of these, or less.
MOST = {"num_layers": 256, "num_decoder_layers": 256, "num_res_blocks": 16, "num_attention_heads": 512,
        "attention_head_dim": 1024, "rope_max_seq_len": 2**14, "num_heads": 512, "z_dim": 1024, "patch_size": 16,
        "scale_factor_spatial": 128, "scale_factor_temporal": 64}  # fmt: skip
MOST_OF_ANY = 2**20  # any whole number, such as a layer's width or the size of a vocabulary
LONGEST_LIST = {"latents_mean": 1024, "latents_std": 1024}
LONGEST_LIST_OF_ANY = 16  # of the numbers of a list, such as those of blocks


def check_counts(config: dict, file: Path) -> None:
    """Raises ValueError for a config, the JSON of `file`, where a number is none, or not above 0, or larger than any
    network has it, or a list is longer."""
    wrong = [f"{name} {shown(repr(config[name]))}" for name in COUNTS
             if name in config and not (type(config[name]) is int and config[name] > 0)]  # fmt: skip
    patch = config.get("patch_size")
    if not all(type(one) is int and one > 0 for one in (patch if isinstance(patch, (list, tuple)) else [patch or 1])):
        wrong.append(f"patch_size {shown(repr(patch))}")
    if wrong:
        raise ValueError(f"{file} says {', '.join(wrong)}. That must be whole numbers above 0. Download it again.")
    wrong = [f"{name} {shown(repr(config[name]))}" for name in EPSILONS
             if name in config and not (_is_finite(config[name]) and config[name] > 0)]  # fmt: skip
    if wrong:
        raise ValueError(f"{file} says {', '.join(wrong)}. That must be numbers above 0. Download it again.")
    large = [f"{name} {shown(repr(value))} (at most {most})" for name, value in config.items() if _is_name(name)
             for most in [MOST.get(name, MOST_OF_ANY)] if _largest(value) > most]  # fmt: skip
    long = [f"{name} of {len(value)} (at most {most})" for name, value in config.items()
            if _is_name(name) and isinstance(value, (list, tuple))
            for most in [LONGEST_LIST.get(name, LONGEST_LIST_OF_ANY)] if len(value) > most]  # fmt: skip
    if large or long:
        raise ValueError(f"{file} says {', '.join((large + long)[:4])}, more than any network has. Download it again.")


def check_vae(config: dict, where: Path) -> None:
    """Raises ValueError for the config of a VAE whose latents are normalised by what are no numbers, or whose factors
    of scale are not those of its layers."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    for name, given, least in (("latents_mean", mean, -math.inf), ("latents_std", std, 0)):
        listed = isinstance(given, (list, tuple))
        if given is not None and not (listed and all(_is_finite(one) and one > least for one in given)):
            raise ValueError(
                f"{where} has {name} {shown(repr(given))}; that must be a list of numbers"
                f"{' above 0' if least == 0 else ''}. Download it again."
            )
    steps, temporal = config.get("dim_mult", (1, 2, 4, 4)), config.get("temperal_downsample", (False, True, True))
    if not (isinstance(steps, (list, tuple)) and isinstance(temporal, (list, tuple)) and steps):
        return  # which the network's own class says of it
    made = {"scale_factor_spatial": 2 ** (len(steps) - 1) * (config.get("patch_size") or 1),
            "scale_factor_temporal": 2 ** sum(map(bool, temporal))}  # fmt: skip
    wrong = [f"{name} {config[name]}, but its layers make it {own}" for name, own in made.items()
             if config.get(name, own) != own]  # fmt: skip
    if wrong:
        raise ValueError(f"{where} has {', and '.join(wrong)}. Download it again.")


def _is_finite(number: object) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _is_name(name: str) -> bool:
    """Whether it may be a network's parameter, and no note of who wrote the file."""
    return name.isidentifier() and not name.startswith("_")


def _largest(value: object) -> int:
    """The largest of one or several whole numbers, without their sign."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((abs(one) for one in values if isinstance(one, int)), default=0)


def count(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are, numbered from 0 behind `prefix`. Raises ValueError where a number is missing."""
    found = {name.removeprefix(prefix).split(".")[0]: name for name in shapes if name.startswith(prefix)}
    wanted = [str(number) for number in range(len(found))]
    missing = next((number for number in wanted if number not in found), None)
    if missing is not None:
        strange = [name for number, name in found.items() if number not in wanted]
        raise ValueError(f"there is no {prefix}{missing}, but {', '.join(map(shown, strange[:3]))}")
    return len(found)
