"""What a plan sends between machines, and the seconds that this takes at the link's rate.

A rank sends to all others of its group in an all-to-all, and to the next one otherwise, as rings and Gloo's, NCCL's and
HCCL's gathers and sums in rings do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..specs import Plan
from .exchange import Exchange, exchanges, step_of
from .facts import ITEMSIZES, Arrangement, Between, Machine, Model, Network, Video

GROUPS = {"sequence": ("ring", "ulysses"), "fsdp": ("cfg", "ring", "ulysses")}  # the axes of groups along several


class Crossing(NamedTuple):
    """What goes between machines: of the rank that sends the most, and of the machine that does."""

    of_rank: float
    of_machine: float


def crossing(exchange: Exchange, plan: Plan, hosts: tuple[int, ...]) -> Crossing:
    """Bytes of an exchange. hosts: of `Machine`."""
    shares = _shares(plan, exchange.axis, exchange.operation == "all_to_all", hosts)
    return Crossing(*(share * exchange.sent for share in shares))


@lru_cache(maxsize=4096)
def _shares(plan: Plan, axis: str, to_all: bool, hosts: tuple[int, ...]) -> Crossing:
    """Of the bytes that each rank sends along an axis."""
    leaving: Counter[int] = Counter()
    for line in plan.lines(*GROUPS.get(axis, (axis,))):
        for place, rank in enumerate(line):
            peers = [other for other in line if other != rank] if to_all else [line[(place + 1) % len(line)]]
            leaving[rank] += sum(hosts[other] != hosts[rank] for other in peers) / max(1, len(peers))
    of_machines: Counter[int] = Counter()
    for rank, share in leaving.items():
        of_machines[hosts[rank]] += share
    return Crossing(max(leaving.values()), max(of_machines.values()))


def sent_seconds(exchange: Exchange, plan: Plan, machine: Machine, costs: Mapping[str, float]) -> float:
    """What the bytes of an exchange take: a group waits for its slowest link."""
    within = exchange.sent * costs[exchange.axis]
    if machine.link is None:
        return within
    return max(within, machine.link.seconds(*crossing(exchange, plan, machine.hosts)))


def more_seconds(exchange: Exchange, plan: Plan, machine: Machine, costs: Mapping[str, float]) -> float:
    """What an exchange takes longer than within a machine: its bytes, and until the first one arrives."""
    if machine.link is None:
        return 0.0
    later = exchange.times * machine.link.exchange if crossing(exchange, plan, machine.hosts).of_rank else 0.0
    return sent_seconds(exchange, plan, machine, costs) - exchange.sent * costs[exchange.axis] + later


def gathered_seconds(encoders: Sequence[Network], dtype: str, machine: Machine) -> float:
    """What ranks on several machines take to gather shards of all weights of text encoders once."""
    if machine.link is None:
        return 0.0
    nbytes = sum(ITEMSIZES[dtype] * one.numbers for one in encoders) * (machine.ranks - 1) // machine.ranks
    whole = Exchange("fsdp", "send", nbytes, 1)
    return machine.link.seconds(*crossing(whole, Plan(ring=machine.ranks), machine.hosts), exchanges=1)


def between(model: Model, video: Video, arrangement: Arrangement, machine: Machine) -> Between:
    """What a machine sends to others in a step with as many branches as the video's steps have at most."""
    if machine.link is None:
        return Between()
    plan, sent, seconds = arrangement.plan, 0.0, 0.0
    for exchange in exchanges(step_of(model, video, arrangement)):
        of_rank, of_machine = crossing(exchange, plan, machine.hosts)
        sent += of_machine
        seconds += machine.link.seconds(of_rank, of_machine, exchange.times if of_rank else 0)
    return Between(round(sent), seconds)
