"""The work of networks without their weights: FLOPs of a rank in a step, of the VAE, and of text encoders."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from functools import lru_cache

from ...models.family import VAE, Family
from ...models.registry import family as family_named
from ..exchange import Exchange, Step
from ..facts import ITEMSIZES, Network
from .skipped import ALL, StepPart

SMALL_LATENT = 8  # rows and columns of the latent with which FLOPs for each of its elements are counted
# Bytes of tokens between blocks that take as long as dequantizing one number of a weight, which reads and writes some
# 60 bytes in its passes over fp32 numbers; a byte of tokens stands for 20 that a block reads and writes.
DEQUANTIZED = 3
EMBEDDINGS = ("embed", "shared.weight", "lm_head")  # parameters that are looked up, not multiplied


def of_step(step: Step, kept: StepPart = ALL) -> Mapping[str, float]:
    """What a rank computes in a step: "products" and "linear" FLOPs (attention's products with each other, all other
    matrix products), "traffic" (bytes of the tokens that a block passes on, and what takes as long to dequantize
    weights), "blocks" (their number). Products in a ring, whose parts are merged by their sums of exponentials, are
    "merged". kept: what accelerators do not leave out.

    A rank has as many tokens and heads as the one with the most, with padding.
    """
    config, plan = step.network.config, step.plan
    work = step.family.work(config, step.size)
    sequence = step.tokens + step.family.text_in_sequence(config, step.text_tokens)
    tokens = step.own_branches * step.chunk / sequence / plan.tp
    heads = step.heads * plan.ulysses * plan.tp / step.family.heads(config)
    products = sum(block.products for block in work.blocks)
    projections = sum(block.attention for block in work.blocks) - products
    others = work.whole - work.rest - products - projections
    blocks = step.own_branches * step.blocks * kept.blocks
    passed_on = blocks * step.chunk * step.heads * plan.ulysses * step.per_head
    return {
        "merged" if plan.ring > 1 else "products": tokens * heads * products * math.prod(kept),
        "linear": tokens * (work.rest + kept.blocks * (others + kept.attention * projections)),
        "traffic": float(passed_on + kept.blocks * _dequantized(step)),
        "blocks": float(blocks),
    }


def _dequantized(step: Step) -> float:
    """The traffic of dequantizing all weights in blocks once for each branch."""
    shapes = step.network.shapes
    numbers = sum(math.prod(shapes[name]) for name in step.network.packed) if step.arrangement.packed else 0
    return step.own_branches * DEQUANTIZED * numbers / step.plan.tp


def share_taken(exchange: Exchange, kept: StepPart) -> float:
    """The part of a step's exchange that takes place: those of attention with it, those of blocks with these."""
    of_blocks = kept.blocks if exchange.axis in ("ulysses", "ring", "tp", "fsdp") else 1.0
    return of_blocks * (kept.attention if exchange.axis in ("ulysses", "ring") else 1.0)


def decoding_flops(vae: Network, family: Family, shape: tuple[int, ...], ranks: int = 1) -> float:
    """FLOPs of the rank that decodes the largest tile of a latent [B,C,T,H,W], of a plane that `ranks` share."""
    from ...parallel.tiles import grid_of

    batch, _, frames, height, width = shape
    first, next_one = _counted(family.name, json.dumps(dict(vae.config), default=list, sort_keys=True))
    return batch * (first + (frames - 1) * next_one) * grid_of(ranks, height, width).largest


@lru_cache(maxsize=16)
def _counted(name: str, config: str) -> tuple[float, float]:
    """FLOPs to decode an element [H,W] of a latent's first frame, and of each frame after it.

    Runs the network on the meta device, which computes nothing. Attention, which grows faster than a frame, is counted
    for a small one.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ...parallel.tiles import single_tile

    family, fields = family_named(name), json.loads(config)
    form, counts = family.vae_form(fields), []
    with torch.no_grad():
        whole = single_tile(SMALL_LATENT, SMALL_LATENT)
        vae = family.vae(family.network(VAE, fields).eval(), form)
        for frames in (2, 3):
            latent = torch.zeros(form.channels, frames, SMALL_LATENT, SMALL_LATENT, device="meta")
            with FlopCounterMode(display=False) as counter:
                deque(vae.decoded((latent[:, chunk] for chunk in vae.chunks(frames)), whole), maxlen=0)
            counts.append(counter.get_total_flops() / SMALL_LATENT**2)
    return 2 * counts[0] - counts[1], counts[1] - counts[0]


def encoding_flops(encoder: Network, tokens: int) -> float:
    """FLOPs of a prompt of this many tokens: two for each weight that multiplies, and token."""
    weights = (math.prod(shape) for name, shape in encoder.shapes.items() if not _looked_up(name))
    return 2.0 * tokens * sum(weights)


def _looked_up(name: str) -> bool:
    return any(part in name for part in EMBEDDINGS)


def stored_bytes(network: Network, dtype: str) -> int:
    """Bytes of its files; of its weights in `dtype` if there are no files."""
    return network.stored or kept_bytes(network, dtype)


def kept_bytes(network: Network, dtype: str, packed: bool = False) -> int:
    """Bytes of its weights as a rank keeps them, without tensor parallelism or FSDP. packed: in blocks where they can
    be."""
    sizes = {name: ITEMSIZES[network.quantized.get(name, dtype)] for name in network.shapes}
    if packed:
        sizes |= {name: blocks.nbytes / blocks.values for name, blocks in network.packed.items()}
    return int(sum(sizes[name] * math.prod(shape) for name, shape in network.shapes.items()))
