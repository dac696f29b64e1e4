"""Parallel plans: degrees along four mesh axes, whose product is the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from msgspec import Struct

AXES = ("cfg", "ring", "ulysses", "tp")  # outermost (ranks may be far apart) to innermost (the most communication)
CFG_DEGREES = (1, 2)
WITHIN_MACHINES = ("ulysses", "tp")  # axes that send most, so that they are to stay within a machine

Line = tuple[int, ...]  # ranks that form a group


class Plan(Struct, frozen=True, kw_only=True):
    """Degrees along the mesh axes; their product is the number of ranks.

    cfg: guidance branches computed on different ranks. ring: sequence chunks whose keys and values are passed around.
    ulysses: smaller chunks of these, exchanged for heads. tp: slices of the weights.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def degrees(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return self.cfg, self.ring, self.ulysses, self.tp

    @property
    def info(self) -> dict[str, int]:
        return {f"{axis}_degree": degree for axis, degree in zip(AXES, self.degrees)}

    def unguided(self, hosts: Sequence[int] = ()) -> Plan:
        """The plan without guidance: the ranks of the cfg axis join the ulysses axis; or the ring axis, if the ulysses
        axis would cross machines then. hosts: the number of each rank's machine; empty: all are on one."""
        joined = Plan(ring=self.ring, ulysses=self.ulysses * self.cfg, tp=self.tp)
        if self.cfg > 1 and joined.crosses("ulysses", hosts):
            return Plan(ring=self.ring * self.cfg, ulysses=self.ulysses, tp=self.tp)
        return joined

    def lines(self, *axes: str) -> tuple[Line, ...]:
        """The ranks that differ only along these axes, for each combination of places along the others."""
        return lines_along(self.degrees, tuple(map(AXES.index, axes)))

    def crosses(self, axis: str, hosts: Sequence[int]) -> bool:
        """Whether ranks that exchange along an axis are on more than one machine. hosts: as in `unguided`."""
        return bool(hosts) and any(len({hosts[rank] for rank in line}) > 1 for line in self.lines(axis))

    def is_within(self, hosts: Sequence[int]) -> bool:
        """Whether the axes that send most stay within machines."""
        return not any(self.crosses(axis, hosts) for axis in WITHIN_MACHINES)

    def __str__(self) -> str:
        return " x ".join(map(str, self.degrees))


def lines_along(degrees: Sequence[int], dims: Sequence[int]) -> tuple[Line, ...]:
    """The ranks of a grid of these sizes, whose last dim varies fastest, in lines of those that differ only along
    `dims`."""
    lines: dict[Line, list[int]] = {}
    for rank, place in enumerate(product(*map(range, degrees))):
        other = tuple(at for dim, at in enumerate(place) if dim not in dims)
        lines.setdefault(other, []).append(rank)
    return tuple(map(tuple, lines.values()))


def legal_plans(world_size: int) -> list[Plan]:
    """All plans for `world_size` ranks, best first by the published tables: CFG before Ulysses before ring, and tensor
    parallelism last, as it communicates the most."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    plans = [
        Plan(cfg=cfg, ring=ring, ulysses=world_size // (cfg * ring * tp), tp=tp)
        for cfg in CFG_DEGREES
        for ring in divisors
        for tp in divisors
        if world_size % (cfg * ring * tp) == 0
    ]
    return sorted(plans, key=lambda plan: (plan.tp, plan.ring, -plan.cfg))


def choose(world_size: int, preferred: dict[str, int]) -> Plan | None:
    """The best plan with these degrees (axis -> degree; axes that are not named are free), or None."""
    return next((plan for plan in legal_plans(world_size) if _distance(plan, preferred) == 0), None)


def nearest(world_size: int, preferred: dict[str, int]) -> list[Plan]:
    """All plans, those nearest to the preferred degrees first."""
    return sorted(legal_plans(world_size), key=lambda plan: _distance(plan, preferred))


def _distance(plan: Plan, preferred: dict[str, int]) -> float:
    """The number of doublings and halvings between the preferred degrees and the plan."""
    return sum(abs(math.log2(getattr(plan, axis) / degree)) for axis, degree in preferred.items())
