"""Maps the parameter names of all systems that write HunyuanVideo checkpoints to those of diffusers and transformers.

The original (Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/models.py) fuses query, key and value in rows of one layer,
in single blocks with the feed-forward's first layer too (linear1); its head stores shift | scale, diffusers
scale | shift. ComfyUI (comfy/ldm/hunyuan_video/model.py) has Flux's names for the same layers. Fused tensors keep names
of their own here, and `split_transformer` gives diffusers' names to what they hold. A single block's `proj_out` is two
parameters in the network: its columns for the attention, and those for the feed-forward.
"""

from __future__ import annotations

import re

from ....checkpoints.fused import Target, halves_exchanged, layers_of_joined_inputs, layers_of_one_input
from ....checkpoints.renaming import PREFIXES, Rules, renamed

# What msModelSlim inserts before the last part of a name if it moved outliers from activations into weights. The
# layers of modulations and heads are called linear themselves.
MODELSLIM_INSERTS: Rules = (
    (r"\.div(?=\.[^.]+$)", ""),
    (r"(?<!norm1)(?<!norm1_context)(?<!norm)(?<!norm_out)(?<!_mod)(?<!modulation)(?<!final_layer)"
     r"\.linear(?=\.[^.]+$)", ""),
)  # fmt: skip
REFINER = r"^txt_in\.individual_token_refiner\.blocks\.(\d+)\."
OWN_REFINER = r"context_embedder.token_refiner.refiner_blocks.\1."
OWN_TIME = "context_embedder.time_text_embed"
BLOCK, SINGLE_BLOCK = r"^(transformer_blocks\.\d+)\.", r"^(single_transformer_blocks\.\d+)\."
NORM_RULES: Rules = tuple(
    rule
    for part, long in (("q", "query"), ("k", "key"))
    for rule in (
        (rf"{BLOCK}img_attn(_{part}_norm\.weight|\.norm\.{long}_norm\.scale)$", rf"\1.attn.norm_{part}.weight"),
        (rf"{BLOCK}txt_attn(_{part}_norm\.weight|\.norm\.{long}_norm\.scale)$", rf"\1.attn.norm_added_{part}.weight"),
        (rf"{SINGLE_BLOCK}({part}_norm\.weight|norm\.{long}_norm\.scale)$", rf"\1.attn.norm_{part}.weight"),
    )
)
# From the original's names, and ComfyUI's, to diffusers'. No pattern matches diffusers' own names.
TRANSFORMER_RULES: Rules = (
    *MODELSLIM_INSERTS,
    *PREFIXES,
    (r"^img_in\.proj\.", "x_embedder.proj."),
    (r"^time_in\.(mlp\.0|in_layer)\.", "time_text_embed.timestep_embedder.linear_1."),
    (r"^time_in\.(mlp\.2|out_layer)\.", "time_text_embed.timestep_embedder.linear_2."),
    (r"^guidance_in\.(mlp\.0|in_layer)\.", "time_text_embed.guidance_embedder.linear_1."),
    (r"^guidance_in\.(mlp\.2|out_layer)\.", "time_text_embed.guidance_embedder.linear_2."),
    (r"^vector_in\.in_layer\.", "time_text_embed.text_embedder.linear_1."),
    (r"^vector_in\.out_layer\.", "time_text_embed.text_embedder.linear_2."),
    (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (r"^txt_in\.t_embedder\.(mlp\.0|in_layer)\.", f"{OWN_TIME}.timestep_embedder.linear_1."),
    (r"^txt_in\.t_embedder\.(mlp\.2|out_layer)\.", f"{OWN_TIME}.timestep_embedder.linear_2."),
    (r"^txt_in\.c_embedder\.(linear_1|in_layer)\.", f"{OWN_TIME}.text_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.(linear_2|out_layer)\.", f"{OWN_TIME}.text_embedder.linear_2."),
    (rf"{REFINER}adaLN_modulation\.1\.", rf"{OWN_REFINER}norm_out.linear."),
    (rf"{REFINER}self_attn[._]qkv\.", rf"{OWN_REFINER}attn.to_qkv."),
    (rf"{REFINER}self_attn[._]proj\.", rf"{OWN_REFINER}attn.to_out.0."),
    (rf"{REFINER}mlp\.(fc1|0)\.", rf"{OWN_REFINER}ff.net.0.proj."),
    (rf"{REFINER}mlp\.(fc2|2)\.", rf"{OWN_REFINER}ff.net.2."),
    (REFINER, OWN_REFINER),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.shift_scale."),
    (r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."),
    (rf"{BLOCK}img_mod\.lin(ear)?\.", r"\1.norm1.linear."),
    (rf"{BLOCK}txt_mod\.lin(ear)?\.", r"\1.norm1_context.linear."),
    (rf"{BLOCK}img_attn[._]qkv\.", r"\1.attn.to_qkv."),
    (rf"{BLOCK}txt_attn[._]qkv\.", r"\1.attn.add_qkv_proj."),
    (rf"{BLOCK}img_attn[._]proj\.", r"\1.attn.to_out.0."),
    (rf"{BLOCK}txt_attn[._]proj\.", r"\1.attn.to_add_out."),
    (rf"{BLOCK}img_mlp\.(fc1|0)\.", r"\1.ff.net.0.proj."),
    (rf"{BLOCK}img_mlp\.(fc2|2)\.", r"\1.ff.net.2."),
    (rf"{BLOCK}txt_mlp\.(fc1|0)\.", r"\1.ff_context.net.0.proj."),
    (rf"{BLOCK}txt_mlp\.(fc2|2)\.", r"\1.ff_context.net.2."),
    (r"^single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."),
    (rf"{SINGLE_BLOCK}linear2\.", r"\1.proj_out."),
    (rf"{SINGLE_BLOCK}modulation\.lin(ear)?\.", r"\1.norm.linear."),
    *NORM_RULES,
)  # fmt: skip

# What fused tensors hold, with the ratios of their rows; and a single block's `proj_out`, with those of its columns.
QKV = {"to_q": 1, "to_k": 1, "to_v": 1}
ONE_INPUT = {
    "attn.to_qkv": {f"attn.{layer}": ratio for layer, ratio in QKV.items()},
    "attn.add_qkv_proj": {f"attn.add_{part}_proj": 1 for part in "qkv"},
    "linear1": {**{f"attn.{layer}": ratio for layer, ratio in QKV.items()}, "proj_mlp": 4},
}
JOINED_INPUTS = {"proj_out": {"proj_out_attn": 1, "proj_out_mlp": 4}}
FUSED = re.compile(r"^(.*_blocks\.\d+)\.(attn\.to_qkv|attn\.add_qkv_proj|linear1|proj_out)\.(\w+)$")
EXCHANGED = "norm_out.shift_scale"
PART_OF_PROJ_OUT = re.compile(r"^(single_transformer_blocks\.\d+\.proj_out)_(attn|mlp)\.")


def to_diffusers_name(name: str) -> str:
    """diffusers' name of a transformer's parameter, from its name in any system; fused tensors have own names."""
    return renamed(name, TRANSFORMER_RULES)


def split_transformer(name: str, shape: tuple[int, ...]) -> tuple[Target, ...] | None:
    """The parameters in a tensor of this name (after `to_diffusers_name`) and shape; None: one of that name."""
    if name.startswith(f"{EXCHANGED}."):
        return halves_exchanged(name.replace(EXCHANGED, "norm_out.linear"), shape)
    found = FUSED.match(name)
    if found is None:
        return None
    block, layer, leaf = found.groups()
    layers = {f"{block}.{own}": ratio for own, ratio in (ONE_INPUT | JOINED_INPUTS)[layer].items()}
    return (layers_of_joined_inputs if layer in JOINED_INPUTS else layers_of_one_input)(layers, leaf, shape)


def published_name(name: str) -> str:
    """diffusers' name of the tensor that holds a transformer's parameter."""
    return PART_OF_PROJ_OUT.sub(r"\1.", name)


# The VAE: the original has diffusers' names, ComfyUI (comfy/ldm/modules/diffusionmodules/model.py) those of Stable
# Diffusion's, in which the attention's layers are convolutions of size 1, and the decoder numbers its levels from the
# last one on.
VAE_RULES: Rules = (
    (r"^(en|de)coder\.mid\.block_1\.", r"\1coder.mid_block.resnets.0."),
    (r"^(en|de)coder\.mid\.block_2\.", r"\1coder.mid_block.resnets.1."),
    (r"^(en|de)coder\.mid\.attn_1\.norm\.", r"\1coder.mid_block.attentions.0.group_norm."),
    (r"^(en|de)coder\.mid\.attn_1\.(q|k|v)\.", r"\1coder.mid_block.attentions.0.to_\2."),
    (r"^(en|de)coder\.mid\.attn_1\.proj_out\.", r"\1coder.mid_block.attentions.0.to_out.0."),
    (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
LEVELS = 4  # of the VAE
UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.")
IN_UP = {"block": "resnets", "upsample": "upsamplers.0"}
ATTENTION_MATRIX = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def to_vae_name(name: str) -> str:
    """diffusers' name of a VAE's parameter."""

    def up_block(found: re.Match) -> str:
        return f"decoder.up_blocks.{LEVELS - 1 - int(found[1])}.{IN_UP[found[2]]}."

    return UP.sub(up_block, renamed(name, VAE_RULES))


def split_vae(name: str, shape: tuple[int, ...]) -> tuple[Target, ...] | None:
    """See `split_transformer`."""
    return (Target(name, flat=True),) if ATTENTION_MATRIX.search(name) else None


def same(name: str) -> str | None:
    return name
