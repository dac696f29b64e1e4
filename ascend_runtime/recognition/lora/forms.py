"""Which change the tensors of a layer describe, by their roles."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from .changes import Difference, Hadamard, Kronecker, LowRank, WeightChange
from .dependent import Decomposed
from .keys import HADA, HADA_CORES, LOKR, LOKR_CORE, MAGNITUDES

FORM_NAMES = {LowRank: "low-rank pairs", Hadamard: "LoHa", Kronecker: "LoKr", Difference: "differences"}


def change_of(keys: Mapping[str, str]) -> WeightChange | None:
    """The change of a weight by tensors with these roles (see `keys.ROLES`), with the scale 1; None if they make no
    complete change."""
    roles = keys.keys() - {"alpha", "up_bias"}
    magnitudes = roles & MAGNITUDES.keys()
    change = _sum_of(roles - magnitudes, keys)
    if not magnitudes or change is None:
        return change
    if len(magnitudes) > 1 or isinstance(change, Difference):
        return None
    (role,) = magnitudes
    return Decomposed(change, keys[role], of_sum=MAGNITUDES[role])


def form_of(change: WeightChange) -> str:
    """The form's name, as users know it."""
    if isinstance(change, Decomposed):
        inner = "" if isinstance(change.inner, LowRank) else f" of {FORM_NAMES[type(change.inner)]}"
        return f"DoRA{inner}"
    return FORM_NAMES[type(change)]


def _sum_of(roles: set[str], keys: Mapping[str, str]) -> WeightChange | None:
    """The change that is added to a weight."""
    if roles == {"diff"}:
        return Difference(keys["diff"])
    if roles in ({"up", "down"}, {"up", "down", "mid"}):
        return LowRank(keys["up"], keys["down"], mid=keys.get("mid"))
    if roles in ({*HADA}, {*HADA, *HADA_CORES}):
        a1, b1, a2, b2 = (keys[role] for role in HADA)
        return Hadamard((a1, b1), (a2, b2), cores=tuple(keys[x] for x in HADA_CORES if x in roles) or None)
    for first, second in product(*LOKR):
        if roles - {LOKR_CORE} == {*first, *second}:
            return Kronecker(tuple(map(keys.get, first)), tuple(map(keys.get, second)), core=keys.get(LOKR_CORE))
    return None
