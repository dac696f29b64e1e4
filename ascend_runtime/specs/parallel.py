"""The parallel plan that a user requests: how ranks share one video."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Spec, require_choice, require_range
from .plans import AXES, Plan, choose, nearest

RING_EXCHANGES = ("rotate", "gather")
MAX_RANKS = 1024


class ParallelSpec(Spec, frozen=True, kw_only=True):
    """The number of ranks and how they share one video; 0 means automatic.

    ranks: the number of processes, one per device. 0: one per visible device, or one on a CPU.
    cfg_degree: 2 computes the cond and uncond branches on different ranks, 1 computes them in series.
    ring_degree: the number of sequence chunks whose keys and values are passed around a ring of ranks.
    ulysses_degree: the number of smaller chunks of such a chunk, exchanged for heads around each attention.
    tp_degree: the number of slices of each layer's weights. Never automatic, as it communicates the most; 1 is none.
    fsdp: each rank keeps one shard of the weights (of its slice, with tensor parallelism), and gathers a block's
        weights when it needs them. A rank without peers keeps all its weights. None: automatic, if they fit no other
        way, or if that is faster.
    ring_exchange: "rotate" or "gather" (see parallel/ring.py).
    overlap: Ulysses' exchange overlaps with attention (None: set by the environment variable OVERLAP on NPUs, else no).
    If ranks is given, the product of given degrees must match it. With automatic ranks, degrees are preferences: a
    workflow made for eight cards also runs on fewer.
    """

    ranks: int = 0
    cfg_degree: int = 0
    ring_degree: int = 0
    ulysses_degree: int = 0
    tp_degree: int = 1
    fsdp: bool | None = None
    ring_exchange: str = "rotate"
    overlap: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("ranks", "cfg_degree", "ring_degree", "ulysses_degree"):
            if not 0 <= getattr(self, name) <= MAX_RANKS:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 to {MAX_RANKS}, or 0 for automatic.")
        if self.cfg_degree > 2:
            raise ValueError(
                f"cfg_degree is {self.cfg_degree}; it can be 1 or 2, as guidance has two branches. "
                "Put the other ranks on ulysses_degree."
            )
        require_range("tp_degree", self.tp_degree, 1, MAX_RANKS)
        require_choice("ring_exchange", self.ring_exchange, RING_EXCHANGES)
        if self.ranks:
            self.resolve(self.ranks, guided=True)

    def resolve(self, world_size: int, *, guided: bool, hosts: Sequence[int] = ()) -> Plan:
        """The plan for a group of `world_size` ranks. Without guidance, all ranks work on the cond branch. hosts: the
        number of each rank's machine; empty: all are on one.

        Raises ValueError if the degrees do not match the given ranks, or the ranks do not match the group.
        """
        if self.ranks not in (0, world_size):
            raise ValueError(
                f"The plan is for {self.ranks} ranks, but the group has {world_size}. Give a plan for {world_size}, "
                f"or start a group of {self.ranks}."
            )
        given = {axis: getattr(self, f"{axis}_degree") for axis in AXES}
        preferred = {axis: degree for axis, degree in given.items() if degree}
        plan = choose(world_size, preferred)
        if plan is None and self.ranks:
            raise ValueError(self._mismatch(given, nearest(world_size, preferred)[:3]))
        if plan is None:  # weights that can be cut into 4 slices can be cut into 2, but perhaps not into 3
            plan = next(plan for plan in nearest(world_size, preferred) if self.tp_degree % plan.tp == 0)
        return plan if guided else plan.unguided(hosts)

    def _mismatch(self, given: dict[str, int], plans: list[Plan]) -> str:
        product = " x ".join(f"{axis}_degree {degree or 'auto'}" for axis, degree in given.items())
        return (
            f"{product} does not match {self.ranks} ranks. The nearest plans that do ({' x '.join(AXES)}): "
            f"{', '.join(map(str, plans))}. Change the degrees or the ranks, or set them to 0 for automatic "
            "(tp_degree to 1)."
        )
