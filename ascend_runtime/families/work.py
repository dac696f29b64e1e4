"""How much a pass through the Wan transformer computes."""

from __future__ import annotations

from typing import Any

from ..accelerate.report import Work


def work_of(config: Any, blocks: int, batch: int, tokens: int, text_tokens: int) -> Work:
    """FLOPs of a pass, by the matrix products alone. config: a WanTransformer's, of so many blocks; tokens: of one
    video.

    Of a block, with S tokens, L of text, D wide, F in its feed-forward: self-attention 8 S D^2 + 4 S^2 D; attention to
    the text 4 (S + L) D^2 + 4 S L D; feed-forward 4 S D F. (An image's tokens are few beside these.)
    """
    width = config.num_attention_heads * config.attention_head_dim
    products = 4 * tokens**2 * width
    attention = products + 8 * tokens * width**2
    text = 4 * (tokens + text_tokens) * width**2 + 4 * tokens * text_tokens * width
    block = attention + text + 4 * tokens * width * config.ffn_dim
    pixels = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    rest = 2 * tokens * width * pixels * (config.in_channels + config.out_channels)
    return Work(*(float(batch * flops) for flops in (products, attention, block, rest)), blocks=blocks)
