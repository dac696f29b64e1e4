"""Predicts the bytes that a rank sends in a step, along each axis of the mesh, and in how many exchanges.

The formulas are those in the docstrings of `parallel`. A rank's chunk c of the sequence has its padding; h is the
number of heads on a rank, with padding; a branch that a rank computes passes L blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..models.cost import PassSize
from ..models.family import Family
from ..specs import Plan
from .facts import ITEMSIZES, Arrangement, Model, Network, Video
from .holding.weights import Share, kept


class Exchange(NamedTuple):
    """What a rank sends along an axis in a step. operation: "all_to_all", "send", "all_gather" or "all_reduce". times:
    the number of exchanges, for each of which all ranks of a group wait."""

    axis: str
    operation: str
    sent: int
    times: int


@dataclass(frozen=True)
class Step:
    """A step on one rank.

    network: of the expert. shape: of the latent [B,C,T,H,W]. branches: of guidance, on all ranks. again: whether an
    earlier step had the same expert, so that a rank may have the text's keys. rank: its number among all ranks.
    """

    family: Family
    network: Network
    dtype: str
    shape: tuple[int, int, int, int, int]
    text_tokens: int
    arrangement: Arrangement
    branches: int = 2
    again: bool = True
    rank: int = 0
    per_token: bool = False

    @property
    def plan(self) -> Plan:
        return self.arrangement.plan

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def own_branches(self) -> int:
        """The number of branches that a rank computes: one of two if the cfg axis has two ranks."""
        return 1 if self.branches == self.plan.cfg else self.branches

    @property
    def degree(self) -> int:
        """The number of chunks of the sequence."""
        return self.plan.ring * self.plan.ulysses

    @property
    def tokens(self) -> int:
        return math.prod(self.family.grid(self.network.config, self.shape[2:]))

    @property
    def chunk(self) -> int:
        """The tokens of a rank, with padding."""
        behind = self.family.text_in_sequence(self.network.config, self.text_tokens)
        return -(-(self.tokens + behind) // self.degree)

    @property
    def video(self) -> int:
        """The tokens of a rank that are the video's."""
        place = self.rank // self.plan.tp % self.degree
        return min(max(self.tokens - place * self.chunk, 0), self.chunk)

    @property
    def size(self) -> PassSize:
        return PassSize(self.shape[0], self.tokens, self.chunk, self.text_tokens, self.per_token)

    @property
    def heads(self) -> int:
        """The heads of a rank around attention, with padding."""
        return -(-self.family.heads(self.network.config) // (self.plan.ulysses * self.plan.tp))

    @property
    def per_head(self) -> int:
        """Bytes of a head of a token, for all videos."""
        config = self.network.config
        return self.itemsize * self.shape[0] * self.family.width(config) // self.family.heads(config)

    @property
    def token_output(self) -> int:
        """Bytes of a token's velocity, for all videos."""
        channels = self.family.form(self.network.config).channels
        return self.itemsize * self.shape[0] * channels * math.prod(self.shape[2:]) // self.tokens

    @property
    def blocks(self) -> int:
        return len(self.family.work(self.network.config, self.size).blocks)


def sent(model: Model, video: Video, arrangement: Arrangement) -> Mapping[str, int]:
    """Bytes that rank 0 sends in a step with as many branches as the video's steps have at most, by mesh axis
    ("sequence" is ring and Ulysses together) and "fsdp". An expert's later steps: the first may send more (see
    `Step.again`)."""
    found = Counter()
    for exchange in exchanges(step_of(model, video, arrangement)):
        found[exchange.axis] += exchange.sent
    return dict(found)


def step_of(model: Model, video: Video, arrangement: Arrangement, expert: int = 0, branches: int | None = None) -> Step:
    """A step of this video. branches: None is the most of all steps."""
    most = max((number for _, number in video.passes[video.computed]), default=1)
    return Step(
        family=model.family,
        network=model.experts[expert],
        dtype=model.dtype,
        shape=video.shape,
        text_tokens=video.text_tokens,
        arrangement=arrangement,
        branches=most if branches is None else branches,
        per_token=video.per_token,
    )


def exchanges(step: Step) -> list[Exchange]:
    """All that a rank sends in a step, without empty exchanges."""
    found = (*_of_sequence(step), *_of_slices(step), *_of_branches(step), *_of_shards(step))
    return [exchange for exchange in found if exchange.times]


def _of_sequence(step: Step) -> Iterator[Exchange]:
    """Ulysses sends 4 (U-1)/U of a rank's chunk; the ring (R-1) times its key and value; the velocity's chunks are
    gathered."""
    ring, ulysses = step.plan.ring, step.plan.ulysses
    attended = step.own_branches * step.blocks
    if ulysses > 1:
        parts = min(2, step.heads) if step.arrangement.overlap else 1
        chunk = step.chunk * step.heads * ulysses * step.per_head
        yield Exchange("ulysses", "all_to_all", attended * 4 * chunk * (ulysses - 1) // ulysses, attended * 4 * parts)
    if ring > 1:
        key_value = 2 * step.chunk * ulysses * step.heads * step.per_head
        rotates = step.arrangement.ring_exchange == "rotate"
        operation, times = ("send", ring - 1) if rotates else ("all_gather", 2)
        yield Exchange("ring", operation, attended * (ring - 1) * key_value, attended * times)
    if step.degree > 1:
        own = step.chunk * step.token_output
        yield Exchange("sequence", "all_gather", step.own_branches * (step.degree - 1) * own, step.own_branches)


def _of_slices(step: Step) -> Iterator[Exchange]:
    """An all-reduce sends 2 (T-1)/T of a tensor, an all-gather (T-1) times a rank's slice."""
    tp, branches = step.plan.tp, step.own_branches
    if tp == 1:
        return
    sums = step.family.sliced_sums(step.network.config, step.size, step.video, step.itemsize, step.again)
    yield Exchange("tp", "all_reduce", branches * sums.reduced * 2 * (tp - 1) // tp, branches * sums.reductions)
    yield Exchange("tp", "all_gather", branches * sums.gathered // tp * (tp - 1), branches * sums.gathers)


def _of_branches(step: Step) -> Iterator[Exchange]:
    """The two ranks of a cfg axis gather each other's velocity."""
    if step.plan.cfg > 1 and step.branches == step.plan.cfg:
        yield Exchange("cfg", "all_gather", (step.plan.cfg - 1) * step.tokens * step.token_output, 1)


def _of_shards(step: Step) -> Iterator[Exchange]:
    """With FSDP over R ranks, a rank sends its shard R-1 times in each pass: of each tensor, as many rows as the rank
    with the most has."""
    ranks = math.prod(step.plan.degrees) // step.plan.tp
    if step.arrangement.fsdp and ranks > 1:
        shard = shard_bytes(step.family, step.network, step.dtype, step.plan.tp, ranks)
        yield Exchange("fsdp", "send", step.own_branches * (ranks - 1) * shard, step.own_branches * (step.blocks + 1))


def shard_bytes(family: Family, network: Network, dtype: str, tp: int, ranks: int) -> int:
    """Bytes of a rank's shard of all weights that FSDP shards over `ranks`, of a slice by tensor parallelism. The first
    rank's, as no other has more rows."""
    rules = family.weights
    parts = kept(network, rules, dtype, Share(tp, shards=ranks))
    return sum(part.nbytes for name, part in parts.items() if not rules.replicated(name))
