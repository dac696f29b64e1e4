"""A network's config, read off the shapes of its tensors where no config.json lies beside them."""

from __future__ import annotations

import math

Shapes = dict[str, tuple[int, ...]]  # by the names of diffusers or transformers

HEAD_DIM = 128  # of every Wan transformer of the original
TRANSFORMER_TELLS = (
    "patch_embedding.weight",
    "blocks.0.ffn.net.0.proj.weight",
    "proj_out.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "condition_embedder.time_embedder.linear_1.weight",
)


def transformer_config(shapes: Shapes, heads: int | None = None) -> dict:
    """That of diffusers' WanTransformer3DModel. heads: where it is known; else each is 128 wide."""
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    heads = heads or dim // HEAD_DIM
    has_image = "condition_embedder.image_embedder.ff.net.0.proj.weight" in shapes
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
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


def count(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are, numbered from 0 behind `prefix`."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)]
    return max(numbers) + 1 if numbers else 0
