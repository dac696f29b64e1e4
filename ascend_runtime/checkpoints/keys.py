"""Parameter names of the systems that write checkpoints, and what diffusers and transformers call them."""

from __future__ import annotations

import re

Rules = tuple[tuple[str, str], ...]  # patterns and replacements, in order: a later one sees what the earlier ones made

# The transformer, of the original (Wan-Video/Wan2.2, wan/modules/model.py), ComfyUI (a prefix), MindSpeed-MM
# (checkpoint/sora_model/wan_converter.py) and diffusers, whose names no pattern fits.
TRANSFORMER: Rules = (
    (r"^(model\.diffusion_model|module|predictor)\.", ""),
    (r"(self|cross)_attn\.proj_(q|k|v)\.", r"\1_attn.\2."),
    (r"(self|cross)_attn\.proj_out\.", r"\1_attn.o."),
    (r"cross_attn\.k_norm_img", "cross_attn.norm_k_img"),
    (r"(self|cross)_attn\.(q|k)_norm", r"\1_attn.norm_\2"),
    (r"^text_embedding\.linear_", "condition_embedder.text_embedder.linear_"),
    (r"self_attn\.norm_(q|k)", r"attn1.norm_\1"),
    (r"self_attn\.(q|k|v)\.", r"attn1.to_\1."),
    (r"self_attn\.o\.", "attn1.to_out.0."),
    (r"cross_attn\.norm_k_img", "attn2.norm_added_k"),
    (r"cross_attn\.(k|v)_img\.", r"attn2.add_\1_proj."),
    (r"cross_attn\.norm_(q|k)", r"attn2.norm_\1"),
    (r"cross_attn\.(q|k|v)\.", r"attn2.to_\1."),
    (r"cross_attn\.o\.", "attn2.to_out.0."),
    (r"ffn\.0\.", "ffn.net.0.proj."),
    (r"ffn\.2\.", "ffn.net.2."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
)


def to_diffusers_name(name: str) -> str | None:
    """diffusers' name of a transformer's parameter, by its name in any system; None: it is no parameter."""
    return None if name.endswith("._extra_state") else renamed(name, TRANSFORMER)  # what Megatron's layers note


def renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
