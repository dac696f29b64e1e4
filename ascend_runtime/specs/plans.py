"""The ways in which ranks can share one video: degrees along four axes, whose product is the number of ranks."""

from __future__ import annotations

import math

from msgspec import Struct

AXES = ("cfg", "ring", "ulysses", "tp")  # from the outermost, whose ranks may be far apart, to the innermost
CFG_DEGREES = (1, 2)


class Plan(Struct, frozen=True, kw_only=True):
    """Degrees that fit a number of ranks.

    cfg: branches of guidance on different ranks. ring: parts of the sequence whose keys and values travel.
    ulysses: chunks of a part, exchanged for heads. tp: slices of the weights.
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
        """For one branch: the ranks of the second share its sequence."""
        return Plan(ring=self.ring, ulysses=self.ulysses * self.cfg, tp=self.tp)

    def __str__(self) -> str:
        return " x ".join(map(str, self.degrees))


def legal_plans(world_size: int) -> list[Plan]:
    """All plans for so many ranks, the best first by the published tables: CFG before Ulysses before a ring, and no
    tensor parallelism, whose exchanges are the largest."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    plans = [
        Plan(cfg=cfg, ring=ring, ulysses=world_size // (cfg * ring * tp), tp=tp)
        for cfg in CFG_DEGREES
        for ring in divisors
        for tp in divisors
        if world_size % (cfg * ring * tp) == 0
    ]
    return sorted(plans, key=lambda plan: (plan.tp, plan.ring, -plan.cfg))


def choose(world_size: int, wish: dict[str, int]) -> Plan | None:
    """The best plan with these degrees (axis -> degree; an axis that is not named is free), or None."""
    return next((plan for plan in legal_plans(world_size) if _distance(plan, wish) == 0), None)


def nearest(world_size: int, wish: dict[str, int]) -> list[Plan]:
    """All plans, the nearest to the wish first."""
    return sorted(legal_plans(world_size), key=lambda plan: _distance(plan, wish))


def _distance(plan: Plan, wish: dict[str, int]) -> float:
    """Doublings and halvings from the wish to the plan."""
    return sum(abs(math.log2(getattr(plan, axis) / degree)) for axis, degree in wish.items())
