"""How ranks share one video: the plan that a user asks for."""

from __future__ import annotations

from .base import Spec, require_choice, require_range
from .plans import AXES, Plan, choose, nearest

RING_EXCHANGES = ("rotate", "gather")
MAX_RANKS = 1024


class ParallelSpec(Spec, frozen=True, kw_only=True):
    """How many ranks there are and how they share one video; 0 leaves the choice to the runtime.

    ranks: processes, one a device. 0: as many as visible devices, one on a CPU.
    cfg_degree: 2 computes the cond and the uncond branch on different ranks, 1 one after the other.
    ring_degree: parts of the sequence whose keys and values travel from rank to rank.
    ulysses_degree: chunks of such a part, exchanged for heads around each attention.
    tp_degree: slices of the weights of each layer. Never chosen by the runtime, as it exchanges the most: 1 is none.
    fsdp: of the weights, or of this slice of them, each rank keeps a share, and gathers a block's when its turn comes.
        Ranks that have nobody to share with keep all.
    ring_exchange: "rotate" or "gather" (see parallel/ring.py). overlap: Ulysses' exchange travels while attention
        computes (None: what the variable OVERLAP asks for on NPUs, else not).
    With given ranks, given degrees must make them. With automatic ranks the degrees are a wish: what was made for
    eight cards runs on fewer.
    """

    ranks: int = 0
    cfg_degree: int = 0
    ring_degree: int = 0
    ulysses_degree: int = 0
    tp_degree: int = 1
    fsdp: bool = False
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

    def resolve(self, world_size: int, *, guided: bool) -> Plan:
        """The plan for a group of `world_size` ranks. Without guidance every rank works on the one branch.

        Raises ValueError where given degrees do not make the given ranks, or the group has other ranks.
        """
        if self.ranks not in (0, world_size):
            raise ValueError(
                f"The plan is for {self.ranks} ranks, but the group has {world_size}. Give a plan for {world_size}, "
                f"or start a group of {self.ranks}."
            )
        given = {axis: getattr(self, f"{axis}_degree") for axis in AXES}
        wish = {axis: degree for axis, degree in given.items() if degree}
        plan = choose(world_size, wish)
        if plan is None and self.ranks:
            raise ValueError(self._mismatch(given, nearest(world_size, wish)[:3]))
        if plan is None:  # weights that can be cut into 4 slices can be cut into 2, and perhaps not into 3
            plan = next(plan for plan in nearest(world_size, wish) if self.tp_degree % plan.tp == 0)
        return plan if guided else plan.unguided()

    def _mismatch(self, given: dict[str, int], plans: list[Plan]) -> str:
        product = " x ".join(f"{axis}_degree {degree or 'auto'}" for axis, degree in given.items())
        return (
            f"{product} does not make {self.ranks} ranks. The nearest plans that do ({' x '.join(AXES)}): "
            f"{', '.join(map(str, plans))}. Change the degrees or the ranks, or set them to 0 for automatic "
            "(tp_degree to 1)."
        )
