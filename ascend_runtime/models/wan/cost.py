"""The FLOPs of a pass through the Wan transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost import BlockWork, PassSize, SlicedSums, Work
from .files.configs import filled

# Up to this ratio of video tokens to text tokens, keys and values of the text are cached. At a ratio of 8, computing
# them again takes 1 % of a block's time.
MAX_TOKEN_RATIO = 16


def width_of(config: Mapping[str, Any]) -> int:
    """The number of channels of a token."""
    config = filled(config)
    return config["num_attention_heads"] * config["attention_head_dim"]


def work_of(config: Mapping[str, Any], size: PassSize) -> Work:
    """FLOPs of a pass, counting only the matrix products.

    A block with S tokens, L text tokens, width D and feed-forward width F: self-attention 8 S D^2 + 4 S^2 D;
    cross-attention 4 (S + L) D^2 + 4 S L D, without the first L if keys and values are cached; feed-forward 4 S D F.
    (An image's few tokens are not counted.) The rest is the patch embedding, the head, and the timestep embedding, with
    one text token.
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


def worth_keeping(tokens: int, text_tokens: int) -> bool:
    """Whether a rank caches a block's keys and values of the text, for `tokens` video tokens on the rank."""
    return tokens <= MAX_TOKEN_RATIO * text_tokens


def sums_of(config: Mapping[str, Any], size: PassSize, itemsize: int, again: bool) -> SlicedSums:
    """What ranks of tensor parallelism exchange in a pass.

    A block all-reduces the tokens three times, and with each attention the squares of queries and keys in fp32: of the
    tokens three times, and of the text unless its keys are cached.
    """
    config, width = filled(config), width_of(config)
    cached = again and worth_keeping(size.on_rank, size.text_tokens)
    norms = 4 * (3 * size.on_rank + (0 if cached else size.text_tokens))
    block = 3 * size.on_rank * width * itemsize + norms
    return SlicedSums(config["num_layers"] * size.batch * block, 5 * config["num_layers"])
