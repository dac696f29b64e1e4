"""The FLOPs of a pass through the HunyuanVideo transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost import BlockWork, PassSize, SlicedSums, Work
from .files.configs import filled, width_of

FREQUENCIES = 256  # of a sinusoid
REFINER_RATIO = 4  # of its feed-forward's width to the tokens'


def work_of(config: Mapping[str, Any], size: PassSize) -> Work:
    """FLOPs of a pass, counting only the matrix products.

    With N tokens of video and text, width D and a feed-forward of width R D: attention is 8 N D^2 + 4 N^2 D in a double
    block, 6 N D^2 + 4 N^2 D in a single one, whose output projection is a part of proj_out. Either block is
    (8 + 4 R) N D^2 + 4 N^2 D, and modulation: 24 D^2 or 6 D^2, twice with a clean first frame. On many ranks each
    computes its own modulation and all that is in `_rest` but the patches, which is not counted.
    """
    config, width = filled(config), width_of(config)
    tokens, square = size.tokens + size.text_tokens, width**2
    products = 4 * tokens**2 * width
    whole = products + (8 + 4 * config["mlp_ratio"]) * tokens * square
    double, single = (
        BlockWork(*(float(size.batch * flops) for flops in (products, attention, whole + modulation)))
        for attention, modulation in (
            (products + 8 * tokens * square, 24 * _vectors(config) * square),
            (products + 6 * tokens * square, 6 * _vectors(config) * square),
        )
    )
    blocks = (double,) * config["num_layers"] + (single,) * config["num_single_layers"]
    return Work(blocks, float(size.batch * _rest(config, size)))


def _vectors(config: Mapping[str, Any]) -> int:
    """The number of vectors that modulate: a clean first frame has its own."""
    return 2 if config["image_condition_type"] == "token_replace" else 1


def _rest(config: Mapping[str, Any], size: PassSize) -> float:
    """FLOPs outside of blocks for one video: patches and head, the text's refiner, and the vectors."""
    width, text, tokens = width_of(config), config["text_embed_dim"], size.text_tokens
    patch = config["patch_size"] ** 2 * config["patch_size_t"]
    head = 2 * width * patch * (size.tokens * config["in_channels"] + (size.tokens + tokens) * config["out_channels"])

    def embedder(inputs: int) -> int:
        return 2 * width * (inputs + width)

    block = 4 * tokens**2 * width + (8 + 4 * REFINER_RATIO) * tokens * width**2 + 4 * width**2
    refiner = config["num_refiner_layers"] * block + 2 * tokens * text * width + embedder(FREQUENCIES) + embedder(text)
    sinusoids = _vectors(config) + bool(config["guidance_embeds"])
    return head + 4 * width**2 + refiner + sinusoids * embedder(FREQUENCIES) + embedder(config["pooled_projection_dim"])


def sums_of(config: Mapping[str, Any], size: PassSize, video: int, itemsize: int) -> SlicedSums:
    """What ranks of tensor parallelism exchange in a pass.

    A double block all-reduces the tokens twice, a single one once. A double block gathers six vectors of modulation for
    each of the two streams that has tokens on the rank, a single block three; each twice with a clean first frame.
    """
    config, width = filled(config), width_of(config)
    double, single, streams = config["num_layers"], config["num_single_layers"], (video > 0) + (video < size.on_rank)
    reduced = (2 * double + single) * size.on_rank * width * size.batch * itemsize
    gathered = (6 * streams * double + 3 * single) * _vectors(config) * width * size.batch * itemsize
    return SlicedSums(reduced, 2 * streams * double + single, gathered, double + single)
