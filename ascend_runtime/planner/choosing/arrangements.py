"""All ways in which ranks can share a job, as far as the user leaves them open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ...specs import ParallelSpec, Plan
from ...specs.plans import AXES, legal_plans
from ..facts import Arrangement, Machine, Model, Video

WHOLE, PUBLISHED = "whole", "published"  # tiles of the VAE


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; "auto", None or 0 is left to the planner."""

    parallel: ParallelSpec = ParallelSpec()
    experts: str = "auto"
    encoder: str = "auto"
    tiles: str = "auto"
    packed: bool | None = None


def arrangements(model: Model, video: Video, machine: Machine, fixed: Fixed, tiles: str) -> list[Arrangement]:
    """Those that are possible, whether they fit or not; of equally fast ones the first is to be preferred."""
    parallel = fixed.parallel
    made = [
        Arrangement(plan, fsdp, experts, encoder, tiles, parallel.ring_exchange, bool(parallel.overlap))
        for plan in plans(model, video, machine, parallel)
        for fsdp, experts, encoder in product(
            _fsdp(plan, parallel.fsdp), _experts(model, fixed.experts), _encoders(model, fixed.encoder)
        )
    ]
    return [one for one in made if not (one.fsdp and one.experts == "swap")]  # shards do not wait on the host


def in_form(made: list[Arrangement], model: Model, packed: bool) -> list[Arrangement]:
    """These arrangements with weights in the blocks of their files, or in full. Experts with other blocks take no
    turns."""
    alike = not packed or len({tuple(one.packed.items()) for one in model.experts}) == 1
    return [replace(one, packed=packed) for one in made if alike or one.experts != "swap"]


def open_tiles(model: Model, machine: Machine, fixed: Fixed) -> tuple[str, ...]:
    """The VAE's tiles in the order in which they are tried: blended ones change a video's values, so that they are
    used only if no whole plane fits."""
    dealt = machine.ranks == 1 or model.family.deals_tiles
    return (fixed.tiles,) if fixed.tiles != "auto" else (WHOLE, PUBLISHED) if dealt else (WHOLE,)


def open_forms(model: Model, machine: Machine, fixed: Fixed) -> list[tuple[str, bool]]:
    """(the VAE's tiles, whether weights stay in the blocks of their files) in the order in which they are tried: blocks
    take a little time in each step, so that they are used only if the weights do not fit in full."""
    can = any(one.packed for one in model.experts)
    packed = (False, True) if can and fixed.packed is None else (can and bool(fixed.packed),)
    return [(tiles, one) for tiles in open_tiles(model, machine, fixed) for one in packed]


def plans(model: Model, video: Video, machine: Machine, parallel: ParallelSpec) -> list[Plan]:
    """The plans with the degrees that the user has fixed, without those that cannot be the best. If there is none, the
    one that a job takes instead. Ulysses and tensor parallelism cross machines only if nothing else is left."""
    given = {axis: getattr(parallel, f"{axis}_degree") for axis in AXES}
    found = [
        plan for plan in legal_plans(machine.ranks)
        if all(degree in (0, getattr(plan, axis)) for axis, degree in given.items())
        and (plan.cfg == 1 or video.guided or given["cfg"])  # without guidance, its ranks join the ulysses axis
        and (plan.tp == 1 or is_cut_by(plan.tp, model))
    ]  # fmt: skip
    if not given["ring"]:
        if video.acceleration.rainfusion:  # needs all tokens of a head on one rank
            found = [plan for plan in found if plan.ring == 1] or found
        found = [plan for plan in found if plan.is_within(machine.hosts)] or found
        shortest = _shortest_rings(found) if machine.hosts else {}
        found = [plan for plan in found if plan.ring == shortest.get((plan.cfg, plan.tp), 1)
                 or plan == _least_ring(plan, found, heads(model))]  # fmt: skip
    return found or [parallel.resolve(machine.ranks, guided=video.guided, hosts=machine.hosts)]


def _shortest_rings(plans: list[Plan]) -> dict[tuple[int, int], int]:
    """The shortest ring of plans with these degrees of cfg and tp."""
    ways = {(plan.cfg, plan.tp) for plan in plans}
    return {way: min(plan.ring for plan in plans if (plan.cfg, plan.tp) == way) for way in ways}


def _least_ring(plan: Plan, plans: list[Plan], heads: int) -> Plan | None:
    """Of plans that differ in how they chunk the sequence, the one with the shortest ring whose Ulysses needs no
    padding for heads. A longer ring only sends more."""
    alike = [one for one in plans if (one.cfg, one.tp) == (plan.cfg, plan.tp) and heads % (one.ulysses * one.tp) == 0]
    return min(alike, key=lambda one: one.ring, default=None)


def is_cut_by(tp: int, model: Model) -> bool:
    """Whether tensor parallelism of this degree divides the heads and all weights that it cuts."""
    cut_dim = model.family.weights.cut_dim
    cut = ((shape, cut_dim(name)) for name, shape in model.experts[0].shapes.items())
    return heads(model) % tp == 0 and all(dim is None or shape[dim] == 1 or shape[dim] % tp == 0 for shape, dim in cut)


def heads(model: Model) -> int:
    return model.family.heads(model.experts[0].config)


def _fsdp(plan: Plan, given: bool | None) -> Iterator[bool]:
    has_peers = math.prod(plan.degrees) > plan.tp
    return (one for one in (False, True) if given in (None, one) and (has_peers or one is bool(given)))


def _experts(model: Model, given: str) -> tuple[str, ...]:
    if len(model.experts) == 1:
        return ("resident",)
    same = model.experts[0].shapes == model.experts[1].shapes
    return ("resident", "swap") if given == "auto" and same else ("resident",) if given == "auto" else (given,)


def _encoders(model: Model, given: str) -> tuple[str, ...]:
    return ("ranks", "cpu") if given == "auto" and model.encoders else ("cpu",) if given == "auto" else (given,)
