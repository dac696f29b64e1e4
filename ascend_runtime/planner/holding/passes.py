"""What a step's passes through a transformer take on a rank: asked here, answered by a dry run (see dry_pass.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..facts import Arrangement, Model, Video
from .dry_job import DryNetwork, DryRank, DryVideo, PassBytes
from .kernels import MARGINS
from .weights import packed_in, quantized_layers_of


def network_of(model: Model, tp: int, packed: bool = False) -> DryNetwork:
    """The first expert; the second one is as large. packed: whether weights stay in blocks where they can."""
    expert = model.experts[0]
    blocks = packed_in(expert, model.family.weights, tp) if packed else {}
    layers = frozenset((name.removesuffix(".weight"), one.kind) for name, one in blocks.items())
    return DryNetwork(model.family, as_json(expert.config), model.dtype, quantized_layers_of(expert), tp, layers)


def pass_bytes(model: Model, video: Video, arrangement: Arrangement, kind: str, rank: int) -> PassBytes:
    """Of the rank with this number among all of a job."""
    return _pass_bytes(
        network_of(model, arrangement.plan.tp, arrangement.packed),
        DryVideo(tuple(video.shape), video.text_tokens, video.per_token, own_branches(video, arrangement)),
        DryRank(kind, arrangement.plan, rank, arrangement.ring_exchange, arrangement.overlap),
    )


def taken_by_pass(network: DryNetwork, video: DryVideo, rank: DryRank) -> int:
    """Bytes that a step's passes take of a rank's device, without weights and caches."""
    one = _pass_bytes(network, video, rank)
    return int(MARGINS[rank.kind].blocks * one.blocks) + one.exchange + one.context


def own_branches(video: Video, arrangement: Arrangement) -> int:
    """The number of guidance branches that a rank computes in a step."""
    return 2 if video.guided and arrangement.plan.cfg == 1 else 1


def as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), default=list)


@lru_cache(maxsize=1024)
def _pass_bytes(network: DryNetwork, video: DryVideo, rank: DryRank) -> PassBytes:
    from .dry_pass import run

    return run(network, video, rank)


@lru_cache(maxsize=64)
def gathered_bytes(network: DryNetwork, shards: int) -> int:
    """The bytes that FSDP gathers at most at once, of weights in so many shards: what is outside of units, and two
    units, of which one computes while the next one arrives."""
    from .dry_pass import units_of

    outside, units = units_of(network, shards)
    pairs = (one + following for one, following in zip(units, units[1:]))
    return outside + max(pairs, default=sum(units))
