"""The bytes that a step's passes through a transformer take on a rank, by a dry run of its blocks on the meta device.

The blocks, their exchanges and the conditioning are the real ones; a few blocks stand for all. Only kernels are
replaced (see kernels.py), and exchanges send nothing (see parallel.dry).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from ..models.family import Family
from ..specs import Plan
from .facts import Arrangement, Model, Video
from .weights import quantized_layers_of

TIMESTEP = 500.0  # any


class PassBytes(NamedTuple):
    """context: what the embedders, keys and values of the text and rotary tables take from the first pass to the last.
    blocks: what a pass takes besides at its peak. exchange: of the buffers of exchanges, more at the peak. output: of
    one block's output."""

    context: int
    blocks: int
    exchange: int
    output: int


@dataclass(frozen=True)
class Question:
    """What the bytes of a pass depend on. config: in JSON. in_8_bits: the layers that are quantized. size: of the
    latent [B,C,T,H,W]. branches: that this rank computes in a step."""

    family: Family
    config: str
    dtype: str
    in_8_bits: frozenset[str]
    size: tuple[int, ...]
    text_tokens: int
    per_token: bool
    branches: int
    plan: Plan
    rank: int
    ring_exchange: str
    overlap: bool
    kind: str


def question_of(model: Model, video: Video, arrangement: Arrangement, kind: str, rank: int) -> Question:
    expert = model.experts[0]
    branches = 1 if arrangement.plan.cfg > 1 or not video.guided else 2
    return Question(
        model.family, json.dumps(dict(expert.config), default=list), model.dtype, quantized_layers_of(expert),
        tuple(video.shape), video.text_tokens, video.per_token, branches,
        arrangement.plan, rank, arrangement.ring_exchange, arrangement.overlap, kind,
    )  # fmt: skip


def pass_bytes(question: Question) -> PassBytes:
    from .dry_pass import run

    return run(question)
