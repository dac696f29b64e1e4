"""Which machine each rank is on. Ranks that a client started are all on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..specs.plans import Line
from .mesh import all_reduce_sum, gather_bytes

MACHINE = "ASCEND_RUNTIME_MACHINE"  # the variable with the name of a rank's machine, if a client did not start it


@dataclass(frozen=True)
class Machines:
    """names: of each rank's machine. rank: this rank's number."""

    names: tuple[str, ...]
    rank: int = 0

    @property
    def count(self) -> int:
        return len(set(self.names))

    @property
    def hosts(self) -> tuple[int, ...]:
        """The number of each rank's machine, counted in the order of their first ranks; empty: there is one."""
        order = list(dict.fromkeys(self.names))
        return tuple(map(order.index, self.names)) if len(order) > 1 else ()

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first rank of each machine."""
        return tuple(self.names.index(name) for name in dict.fromkeys(self.names))

    @property
    def members(self) -> tuple[Line, ...]:
        """The ranks of each machine."""
        return tuple(
            tuple(rank for rank, other in enumerate(self.names) if other == name) for name in dict.fromkeys(self.names)
        )

    @property
    def here(self) -> int:
        """The number of this rank's machine."""
        return list(dict.fromkeys(self.names)).index(self.names[self.rank])

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of its machine."""
        return self.rank in self.firsts

    def name_of(self, rank: int) -> str:
        """The name of the machine that a rank is on; empty for ranks that a client started."""
        return self.names[rank]


_known: Machines | None = None


def machines() -> Machines:
    """The machines of all ranks; one, without a name, if `know_machines` was not called."""
    if _known is not None:
        return _known
    return _one_machine() if dist.is_initialized() else Machines(("",))


def know_machines(name: str = "") -> Machines:
    """Learns the machines of all ranks, each of which gives its own one's name. All ranks must call it, once they have
    joined. An empty name, which all ranks give then: all are on one machine, and no rank is asked."""
    global _known
    _known = Machines(tuple(gathered_texts(name)), dist.get_rank()) if name else _one_machine()
    return _known


def sums_of_machines(values: Tensor) -> Tensor:
    """The sums of values [N] over the ranks of each machine, [machines, N] in float64, on the CPU. All ranks must call
    it."""
    here = machines()
    own = torch.zeros(here.count, len(values), dtype=torch.float64)
    own[here.here] = values
    return torch.tensor(all_reduce_sum(own.flatten()), dtype=torch.float64).view_as(own)


def add_machines(shares: Sequence[Tensor]) -> None:
    """Adds to this rank's share, in place, what the other machines have in its place.

    shares: of a tensor on the CPU which each machine has once, in memory that its ranks share; number r is rank r's.
    All ranks must call it. Communication: a machine sends each share of another machine's ranks once.
    """
    here = machines()
    own, arriving, under_way = shares[here.rank], [], []
    for rank, share in enumerate(shares):
        for line in here.members:
            sender = line[rank % len(line)]  # the ranks of a machine in turns
            if rank in line or not share.numel():
                continue
            if here.rank == sender:
                under_way.append(dist.isend(share.contiguous(), rank))
            elif here.rank == rank:
                arriving.append(torch.empty_like(own, memory_format=torch.contiguous_format))
                under_way.append(dist.irecv(arriving[-1], sender))
    for work in under_way:
        work.wait()
    for arrived in arriving:
        own.add_(arrived)


def _one_machine() -> Machines:
    return Machines(("",) * dist.get_world_size(), dist.get_rank())


def gathered_texts(text: str) -> list[str]:
    """Every rank's text, as `mesh.gather_bytes`. All ranks must call it."""
    return [one.decode() for one in gather_bytes(text.encode())]
