"""How much a pass through the Wan transformer computes, and takes."""

from __future__ import annotations

from typing import Any

from ..context import worth_keeping
from ..cost import Work


def work_of(config: Any, blocks: int, batch: int, tokens: int, text_tokens: int, on_rank: int) -> Work:
    """FLOPs of a pass, by the matrix products alone. config: a WanTransformer's, of so many blocks; tokens: of one
    video, `on_rank` of them on a rank.

    Of a block, with S tokens, L of text, D wide, F in its feed-forward: self-attention 8 S D^2 + 4 S^2 D; attention to
    the text 4 (S + L) D^2 + 4 S L D, without the L where keys and values are kept; feed-forward 4 S D F. (An image's
    tokens are few beside these.) The rest is what goes in and out, and the timestep, with one token of text.
    """
    width = config.num_attention_heads * config.attention_head_dim
    products = 4 * tokens**2 * width
    attention = products + 8 * tokens * width**2
    new_keys = 0 if worth_keeping(on_rank, text_tokens) else text_tokens
    text = 4 * (tokens + new_keys) * width**2 + 4 * tokens * text_tokens * width
    block = attention + text + 4 * tokens * width * config.ffn_dim
    pixels = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    rest = 2 * tokens * width * pixels * (config.in_channels + config.out_channels)
    rest += 2 * width * (config.freq_dim + config.text_dim + 8 * width)
    return Work(*(float(batch * flops) for flops in (products, attention, block, rest)), blocks=blocks)


def taken_by(config: Any, tokens: int, itemsize: int, per_token: bool) -> int:
    """Bytes that a pass takes on a rank beside weights and whatever is kept. tokens: of all videos on this rank;
    itemsize: of the blocks' dtype; per_token: whether each token has a timestep.

    A block takes 10.5 times its output around its self-attention, or in its feed-forward 3.3 times and twice what is as
    wide as that. A token's own timestep is 6 vectors in fp32, and as many in each block.
    """
    width = config.num_attention_heads * config.attention_head_dim
    block = max(10.5 * width, 3.3 * width + 2 * config.ffn_dim) * itemsize
    return int(tokens * (block + (12 * width * 4 if per_token else 0)))
