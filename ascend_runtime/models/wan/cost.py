"""What a pass through the Wan transformer computes, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost import BlockWork, PassSize, Work
from .files.configs import filled

FEW = 16  # video tokens a text token, up to which projecting the text again in each pass is felt: 1 % of a block at 8


def width_of(config: Mapping[str, Any]) -> int:
    """The channels of a token."""
    config = filled(config)
    return config["num_attention_heads"] * config["attention_head_dim"]


def work_of(config: Mapping[str, Any], size: PassSize) -> Work:
    """FLOPs of a pass, counting only the matrix products.

    Of a block, with S tokens, L of text, D wide, F in its feed-forward: self-attention 8 S D^2 + 4 S^2 D; attention to
    the text 4 (S + L) D^2 + 4 S L D, without the L where keys and values are kept; feed-forward 4 S D F. (An image's
    tokens are few next to these.) The rest is what goes in and out, and the timestep, with one token of text.
    """
    config, width, tokens = filled(config), width_of(config), size.tokens
    products = 4 * tokens**2 * width
    attention = products + 8 * tokens * width**2
    new_keys = 0 if worth_keeping(size.on_rank, size.text_tokens) else size.text_tokens
    text = 4 * (tokens + new_keys) * width**2 + 4 * tokens * size.text_tokens * width
    block = attention + text + 4 * tokens * width * config["ffn_dim"]
    frames, height, columns = config["patch_size"]
    rest = 2 * tokens * width * frames * height * columns * (config["in_channels"] + config["out_channels"])
    rest += 2 * width * (config["freq_dim"] + config["text_dim"] + 8 * width)
    products, attention, block, rest = (float(size.batch * flops) for flops in (products, attention, block, rest))
    return Work((BlockWork(products, attention, block),) * config["num_layers"], rest)


def taken_by(config: Mapping[str, Any], size: PassSize, itemsize: int) -> int:
    """Bytes that a pass takes on a rank besides weights and caches. itemsize: of the blocks' dtype.

    A block takes 10.5 times its output around its self-attention, or in its feed-forward 3.3 times and twice what is as
    wide as that. A token's own timestep is 6 vectors in fp32, and as many in each block.
    """
    width, ffn_dim = width_of(config), filled(config)["ffn_dim"]
    block = max(10.5 * width, 3.3 * width + 2 * ffn_dim) * itemsize
    return int(size.batch * size.on_rank * (block + (12 * width * 4 if size.per_token else 0)))


def worth_keeping(tokens: int, text_tokens: int) -> bool:
    """Whether a block's keys and values of so many tokens of text are kept next to `tokens` of the video on a rank."""
    return tokens <= FEW * text_tokens
