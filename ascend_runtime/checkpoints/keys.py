"""Parameter names of the original Wan, and what diffusers calls them."""

import re

# In order: a later row sees what the earlier ones made.
ORIGINAL_TO_DIFFUSERS = (
    (r"^model\.diffusion_model\.", ""),
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
_RULES = [(re.compile(pattern), name) for pattern, name in ORIGINAL_TO_DIFFUSERS]


def to_diffusers_name(name: str) -> str:
    """diffusers' name of the transformer parameter that the original calls `name`."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name
