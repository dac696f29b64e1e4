"""All ways in which ranks can share a job, as far as the user leaves them open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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


def arrangements(model: Model, video: Video, machine: Machine, fixed: Fixed) -> list[Arrangement]:
    """Those that are possible, whether they fit or not; of equally fast ones the first is to be preferred.

    Tiles that are blended change a video's values, and are the last: one is taken only if no whole plane fits.
    """
    parallel = fixed.parallel
    made = [
        Arrangement(plan, fsdp, experts, encoder, tiles, parallel.ring_exchange, bool(parallel.overlap))
        for tiles in _tiles(model, machine, fixed.tiles)
        for plan in plans(model, video, machine, parallel)
        for fsdp, experts, encoder in product(
            _fsdp(plan, parallel.fsdp), _experts(model, fixed.experts), _encoders(model, fixed.encoder)
        )
    ]
    return [one for one in made if not (one.fsdp and one.experts == "swap")]  # shards do not wait on the host


def plans(model: Model, video: Video, machine: Machine, parallel: ParallelSpec) -> list[Plan]:
    """The plans with the degrees that the user has fixed. If there is none, the one that a job takes instead."""
    given = {axis: getattr(parallel, f"{axis}_degree") for axis in AXES}
    found = [
        plan for plan in legal_plans(machine.ranks)
        if all(degree in (0, getattr(plan, axis)) for axis, degree in given.items()) and is_useful(plan, model, video, given)
    ]  # fmt: skip
    return found or [parallel.resolve(machine.ranks, guided=video.guided)]


def is_useful(plan: Plan, model: Model, video: Video, given: dict[str, int]) -> bool:
    """Whether a plan can be the best one. given: the degrees that the user has fixed, by axis."""
    if plan.cfg > 1 and not video.guided and not given["cfg"]:
        return False  # its ranks join the ulysses axis
    if plan.tp > 1 and not is_cut_by(plan.tp, model):
        return False
    # The ring sends more than Ulysses, which pads heads that it cannot divide.
    return plan.ring == 1 or bool(given["ring"]) or heads(model) % (plan.ring * plan.ulysses * plan.tp) > 0


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


def _tiles(model: Model, machine: Machine, given: str) -> tuple[str, ...]:
    dealt = machine.ranks == 1 or model.family.deals_tiles
    return (given,) if given != "auto" else (WHOLE, PUBLISHED) if dealt else (WHOLE,)
