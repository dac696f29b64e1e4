"""Measures what it costs to send between machines, by exchanges like those of a job: on the ranks' devices, from each
machine to the next one, in both directions."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..hardware import devices
from ..specs.links import MachineLink
from ..specs.plans import Line
from .machines import Machines, machines
from .mesh import all_reduce_max, group_of

logger = logging.getLogger(__name__)

LEAST, MOST = 2**16, 2**26  # bytes that a machine sends in an exchange
GROWTH = 2
LONG_ENOUGH = 0.06  # seconds of an exchange that shows the rate; a smaller one is mostly its beginning
REPEATS = 3  # of an exchange, whose shortest counts: others meet what else runs

Route = tuple[int, int]  # (the rank that sends, the one that receives)


def measured_link(kind: str) -> MachineLink | None:
    """What it costs to send between machines, for tensors on `kind` devices, alike on all ranks; None: there is one
    machine. Takes about a second. Collective."""
    here = machines()
    if here.count == 1:
        return None
    exchange = _Exchange(kind, here)
    first = exchange.shortest(_routes([line[:1] for line in here.members]))
    rank_byte = exchange.byte(_routes([line[:1] for line in here.members]), first)
    every = max(map(len, here.members)) > 1
    machine_byte = exchange.byte(_routes(here.members), first) if every else rank_byte
    found = MachineLink(rank_byte, min(machine_byte, rank_byte), first)
    logger.info(
        "Between machines: %.3g Gbit/s of a rank, %.3g Gbit/s of all ranks of a machine, %.2g ms until the first byte",
        8e-9 / rank_byte, found.gigabits, 1e3 * first,
    )  # fmt: skip
    return found


def _routes(members: Sequence[Line]) -> list[Route]:
    """From these ranks of each machine to those of the next one; where that has fewer, several send to one."""
    following = [*members[1:], members[0]]
    return [(rank, other[number % len(other)])
            for own, other in zip(members, following) for number, rank in enumerate(own)]  # fmt: skip


class _Exchange:
    """Exchanges along routes, timed."""

    def __init__(self, kind: str, here: Machines):
        self._device, self._here = torch.device(kind), here
        self._group = group_of(kind, (tuple(range(len(here.names))),))  # has exchanged, which makes its communicator

    def shortest(self, routes: Sequence[Route]) -> float:
        """Seconds of an exchange of a byte."""
        self._seconds(routes, 1)  # connects
        return min(self._seconds(routes, 1) for _ in range(REPEATS))

    def byte(self, routes: Sequence[Route], first: float) -> float:
        """Seconds for each byte that a machine sends, of an exchange that is long enough. first: what it takes until
        the first byte arrives."""
        most = max(sum(source in line for source, _ in routes) for line in self._here.members)
        size = LEAST
        while (took := self._seconds(routes, size // most)) < LONG_ENOUGH and size < MOST:
            size *= GROWTH
        took = min(took, *(self._seconds(routes, size // most) for _ in range(REPEATS - 1)))
        return max(took - first, took / 2) / (size // most * most)

    def _seconds(self, routes: Sequence[Route], nbytes: int) -> float:
        """Of the slowest rank, from when all are ready."""
        rank = self._here.rank
        posts = [(peer, torch.ones(nbytes, dtype=torch.uint8, device=self._device))
                 for source, peer in routes if source == rank]  # fmt: skip
        takes = [(source, torch.empty(nbytes, dtype=torch.uint8, device=self._device))
                 for source, peer in routes if peer == rank]  # fmt: skip
        devices.synchronise(self._device)
        all_reduce_max(0)
        start = time.perf_counter()
        exchanges = [dist.P2POp(dist.isend, sent, peer, self._group) for peer, sent in posts]
        exchanges += [dist.P2POp(dist.irecv, taken, peer, self._group) for peer, taken in takes]
        for work in dist.batch_isend_irecv(exchanges) if exchanges else ():
            work.wait()
        devices.synchronise(self._device)
        return all_reduce_max(round(1e9 * (time.perf_counter() - start))) / 1e9
