"""The FLOPs and the memory of a pass through the HunyuanVideo transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost import BlockWork, PassSize, Work
from .files.configs import filled, width_of


def work_of(config: Mapping[str, Any], size: PassSize) -> Work:
    """FLOPs of a pass, counting only the matrix products.

    With S tokens of video and text, and width D: a block's attention 8 S D^2 + 4 S^2 D (in a single block 6 S D^2, as
    its output projection is a part of proj_out), the whole block 16 S D^2 more in a double block, 18 S D^2 in a single
    one, for mlp_ratio 4. The rest is patches, head, and the text's refiner, whose blocks cost the same per token.
    """
    config, width, ratio = filled(config), width_of(config), filled(config)["mlp_ratio"]
    tokens = size.tokens + size.text_tokens
    products, square = 4 * tokens**2 * width, tokens * width**2
    whole = products + (8 + 4 * ratio) * square
    double, single = (
        BlockWork(*(float(size.batch * flops) for flops in (products, attention, whole)))
        for attention in (products + 8 * square, products + 6 * square)
    )
    patch = config["patch_size"] ** 2 * config["patch_size_t"]
    rest = 2 * size.tokens * width * patch * (config["in_channels"] + config["out_channels"])
    refined = 4 * size.text_tokens**2 * width + 24 * size.text_tokens * width**2
    rest += config["num_refiner_layers"] * refined + 2 * size.text_tokens * width * config["text_embed_dim"]
    blocks = (double,) * config["num_layers"] + (single,) * config["num_single_layers"]
    return Work(blocks, float(size.batch * rest))


def taken_by(config: Mapping[str, Any], size: PassSize, itemsize: int) -> int:
    """Bytes that a pass takes on a rank besides weights and caches. itemsize: of the blocks' dtype."""
    config = filled(config)
    return int(size.batch * size.on_rank * (10.5 + 2 * config["mlp_ratio"]) * width_of(config) * itemsize)
