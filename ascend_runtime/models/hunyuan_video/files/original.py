"""The names and shapes of a HunyuanVideo transformer's tensors in ComfyUI, from those of our network's parameters.

ComfyUI (comfy/ldm/hunyuan_video/model.py) fuses layers as the authors' code does, and names them as Flux's.
"""

from __future__ import annotations

import re

from ....checkpoints.renaming import Rules, renamed
from ...shapes import Shapes

REFINER_BLOCK = r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\."
COMFYUI_REFINER = r"txt_in.individual_token_refiner.blocks.\1."
TIME, TEXT_TIME = r"time_text_embed\.", r"^context_embedder\.time_text_embed\."


def _stream(stream: str, norm: str, added: str, feed: str) -> Rules:
    """Of a double block's stream; what diffusers calls its modulation, norms and feed-forward."""
    own, block = r"^transformer_blocks\.(\d+)\.", rf"double_blocks.\1.{stream}_"
    heads, out = (r"add_[qkv]_proj", "to_add_out") if added else ("to_[qkv]", r"to_out\.0")
    return (
        (rf"{own}{norm}\.linear\.", rf"{block}mod.lin."),
        (rf"{own}attn\.{heads}\.", rf"{block}attn.qkv."),
        (rf"{own}attn\.norm_{added}q\.weight$", rf"{block}attn.norm.query_norm.scale"),
        (rf"{own}attn\.norm_{added}k\.weight$", rf"{block}attn.norm.key_norm.scale"),
        (rf"{own}attn\.{out}\.", rf"{block}attn.proj."),
        (rf"{own}{feed}\.net\.0\.proj\.", rf"{block}mlp.0."),
        (rf"{own}{feed}\.net\.2\.", rf"{block}mlp.2."),
    )


SINGLE, OWN_SINGLE = r"single_blocks.\1.", r"^single_transformer_blocks\.(\d+)\."
RULES: Rules = (
    (rf"{TEXT_TIME}timestep_embedder\.", "txt_in.t_embedder."),
    (rf"{TEXT_TIME}text_embedder\.", "txt_in.c_embedder."),
    (rf"^{TIME}timestep_embedder\.", "time_in."),
    (rf"^{TIME}guidance_embedder\.", "guidance_in."),
    (rf"^{TIME}text_embedder\.", "vector_in."),
    (r"^((?:time|guidance|vector|txt)_in\.(?:[tc]_embedder\.)?)linear_1\.", r"\1in_layer."),
    (r"^((?:time|guidance|vector|txt)_in\.(?:[tc]_embedder\.)?)linear_2\.", r"\1out_layer."),
    (r"^x_embedder\.proj\.", "img_in.proj."),
    (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
    (rf"{REFINER_BLOCK}norm_out\.linear\.", rf"{COMFYUI_REFINER}adaLN_modulation.1."),
    (rf"{REFINER_BLOCK}attn\.to_[qkv]\.", rf"{COMFYUI_REFINER}self_attn.qkv."),
    (rf"{REFINER_BLOCK}attn\.to_out\.0\.", rf"{COMFYUI_REFINER}self_attn.proj."),
    (rf"{REFINER_BLOCK}ff\.net\.0\.proj\.", rf"{COMFYUI_REFINER}mlp.0."),
    (rf"{REFINER_BLOCK}ff\.net\.2\.", rf"{COMFYUI_REFINER}mlp.2."),
    (REFINER_BLOCK, COMFYUI_REFINER),
    *_stream("img", "norm1", "", "ff"),
    *_stream("txt", "norm1_context", "added_", "ff_context"),
    (rf"{OWN_SINGLE}(attn\.to_[qkv]|proj_mlp)\.", rf"{SINGLE}linear1."),
    (rf"{OWN_SINGLE}proj_out_(attn|mlp)\.", rf"{SINGLE}linear2."),
    (rf"{OWN_SINGLE}norm\.linear\.", rf"{SINGLE}modulation.lin."),
    (rf"{OWN_SINGLE}attn\.norm_q\.weight$", rf"{SINGLE}norm.query_norm.scale"),
    (rf"{OWN_SINGLE}attn\.norm_k\.weight$", rf"{SINGLE}norm.key_norm.scale"),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
)
JOINED_COLUMNS = re.compile(r"^single_blocks\.\d+\.linear2\.weight$")  # its columns are concatenated; others' rows are


def original_shapes(shapes: Shapes) -> Shapes:
    """The shapes of ComfyUI's tensors by its names, from those of a network's parameters."""
    found: Shapes = {}
    for own, shape in shapes.items():
        name = renamed(own, RULES)
        before = found.get(name)
        if before is None:
            found[name] = shape
        elif JOINED_COLUMNS.match(name):
            found[name] = (shape[0], before[1] + shape[1])
        else:
            found[name] = (before[0] + shape[0], *shape[1:])
    return found
