"""Parallel plans: degrees along four mesh axes, whose product is the number of ranks."""

from __future__ import annotations

import math

from msgspec import Struct

AXES = ("cfg", "ring", "ulysses", "tp")  # outermost (ranks may be far apart) to innermost (the most communication)
CFG_DEGREES = (1, 2)


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

    def unguided(self) -> Plan:
        """The plan without guidance: the ranks of the cfg axis join the ulysses axis."""
        return Plan(ring=self.ring, ulysses=self.ulysses * self.cfg, tp=self.tp)

    def __str__(self) -> str:
        return " x ".join(map(str, self.degrees))


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
