"""Maps the parameter names of all systems that write HunyuanVideo checkpoints to those of diffusers and transformers.

The original (Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/models.py) fuses query, key and value in rows of one layer,
in single blocks with the feed-forward's first layer too (linear1); its head stores shift | scale, diffusers
scale | shift. ComfyUI (comfy/ldm/hunyuan_video/model.py) has Flux's names for the same layers, of which norms end in
`scale` or, in newer versions, in `weight`. Fused tensors keep names
of their own here, and `split_transformer` gives diffusers' names to what they hold. A single block's `proj_out` is two
parameters in the network: its columns for the attention, and those for the feed-forward.
"""

from __future__ import annotations

import re

from ....checkpoints.fused import Target, halves_exchanged, layers_of_joined_inputs, layers_of_one_input
from ....checkpoints.renaming import PREFIXES, Rules, renamed

# What msModelSlim inserts before the last part of a name if it moved outliers from activations into weights, and what
# frameworks prefix. The layers of modulations and heads are called linear themselves.
INSERTS: Rules = (
    (r"\.div(?=\.[^.]+$)", ""),
    (r"(?<!norm1)(?<!norm1_context)(?<!norm)(?<!norm_out)(?<!_mod)(?<!modulation)(?<!final_layer)"
     r"\.linear(?=\.[^.]+$)", ""),
    *PREFIXES,
)  # fmt: skip
REFINER = r"^txt_in\.individual_token_refiner\.blocks\.(\d+)\."
OWN_REFINER = r"context_embedder.token_refiner.refiner_blocks.\1."
DOUBLE_BLOCK, OWN_DOUBLE_BLOCK = r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."
SINGLE_BLOCK, OWN_SINGLE_BLOCK = r"^single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
LEAF = "(?:scale|weight)"  # of a norm's name in ComfyUI
OWN_TIME, OWN_TEXT_TIME = "time_text_embed.", "context_embedder.time_text_embed."


def _embedder(name: str, own: str) -> Rules:
    """Of two layers, which the original calls mlp.0 and mlp.2, ComfyUI in_layer and out_layer."""
    return ((rf"^{name}\.(mlp\.0|linear_1|in_layer)\.", f"{own}.linear_1."),
            (rf"^{name}\.(mlp\.2|linear_2|out_layer)\.", f"{own}.linear_2."))  # fmt: skip


def _stream(stream: str, norm: str, added: str, feed: str) -> Rules:
    """Of a double block's stream, "img" or "txt"; what diffusers calls its modulation, norms and feed-forward."""
    block, own = rf"{DOUBLE_BLOCK}{stream}_", OWN_DOUBLE_BLOCK
    return (
        (rf"{block}mod\.lin(ear)?\.", f"{own}{norm}.linear."),
        (rf"{block}attn[._]qkv\.", f"{own}attn.{'add_qkv_proj' if added else 'to_qkv'}."),
        (rf"{block}attn(_q_norm\.weight|\.norm\.query_norm\.{LEAF})$", f"{own}attn.norm_{added}q.weight"),
        (rf"{block}attn(_k_norm\.weight|\.norm\.key_norm\.{LEAF})$", f"{own}attn.norm_{added}k.weight"),
        (rf"{block}attn[._]proj\.", f"{own}attn.{'to_add_out' if added else 'to_out.0'}."),
        (rf"{block}mlp\.(fc1|0)\.", f"{own}{feed}.net.0.proj."),
        (rf"{block}mlp\.(fc2|2)\.", f"{own}{feed}.net.2."),
    )


# From the original's names, and ComfyUI's, to diffusers', by the first part of a name.
RULES: dict[str, Rules] = {
    "img_in": ((r"^img_in\.proj\.", "x_embedder.proj."),),
    "time_in": _embedder("time_in", f"{OWN_TIME}timestep_embedder"),
    "guidance_in": _embedder("guidance_in", f"{OWN_TIME}guidance_embedder"),
    "vector_in": _embedder("vector_in", f"{OWN_TIME}text_embedder"),
    "txt_in": (
        (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
        *_embedder(r"txt_in\.t_embedder", f"{OWN_TEXT_TIME}timestep_embedder"),
        *_embedder(r"txt_in\.c_embedder", f"{OWN_TEXT_TIME}text_embedder"),
        (rf"{REFINER}adaLN_modulation\.1\.", f"{OWN_REFINER}norm_out.linear."),
        (rf"{REFINER}self_attn[._]qkv\.", f"{OWN_REFINER}attn.to_qkv."),
        (rf"{REFINER}self_attn[._]proj\.", f"{OWN_REFINER}attn.to_out.0."),
        (rf"{REFINER}mlp\.(fc1|0)\.", f"{OWN_REFINER}ff.net.0.proj."),
        (rf"{REFINER}mlp\.(fc2|2)\.", f"{OWN_REFINER}ff.net.2."),
        (REFINER, OWN_REFINER),
    ),
    "double_blocks": (
        *_stream("img", "norm1", "", "ff"),
        *_stream("txt", "norm1_context", "added_", "ff_context"),
        (DOUBLE_BLOCK, OWN_DOUBLE_BLOCK),
    ),
    "single_blocks": (
        (rf"{SINGLE_BLOCK}linear2\.", f"{OWN_SINGLE_BLOCK}proj_out."),
        (rf"{SINGLE_BLOCK}modulation\.lin(ear)?\.", f"{OWN_SINGLE_BLOCK}norm.linear."),
        (rf"{SINGLE_BLOCK}(q_norm\.weight|norm\.query_norm\.{LEAF})$", f"{OWN_SINGLE_BLOCK}attn.norm_q.weight"),
        (rf"{SINGLE_BLOCK}(k_norm\.weight|norm\.key_norm\.{LEAF})$", f"{OWN_SINGLE_BLOCK}attn.norm_k.weight"),
        (SINGLE_BLOCK, OWN_SINGLE_BLOCK),
    ),
    "final_layer": (
        (r"^final_layer\.linear\.", "proj_out."),
        (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.shift_scale."),
    ),
}

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
    plain = renamed(name, INSERTS)
    return renamed(plain, RULES.get(plain.partition(".")[0], ()))


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
