"""The ranks of a cluster as one group, which torchrun has started on several machines."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from ...errors import coded, coded_error
from ...hardware import host
from ...hardware.environment import start_deadline
from ..group import RankDied
from .machine import RelayLink
from .meeting import Meeting
from .words import late_text, waiting_text

logger = logging.getLogger(__name__)

JOIN_DEADLINE = 600  # seconds; torchrun may have to start the ranks, and each loads torch
JOIN_POLL = 0.02  # seconds between looks at what machines have sent
FIRST_NOTICE = 0.5  # seconds; ranks that are ready already need less
AGAIN_DEADLINE = 3.0  # seconds for a machine whose connection was cut to come again; it tries every half second


class ClusterGroup:
    """Ranks on the machines that have come to a meeting. It starts none: torchrun has, and starts them again.

    device: which the machines must have; "auto" for any. kills_before: not used, as each machine counts its own.
    kind: the machines' device, once they have joined.
    """

    may_shard = True  # a rank of a cluster always has the environment for it
    pids: list[int] = []  # none on this host

    def __init__(self, meeting: Meeting, device: str):
        self.world_size = meeting.cluster.ranks
        self.kind = device
        self.kills_before = 0
        self.machines: list[RelayLink] = []
        self._meeting, self._device = meeting, device
        self._stopped = False

    def start(
        self, check: Callable[[], None] = lambda: None, on_notice: Callable[[str], None] = lambda text: None
    ) -> None:
        """Returns when all ranks have joined. Raises TimeoutError, or ValueError if the key or the address cannot be
        used, or the machines have another device.

        check: called while waiting; it may raise. on_notice: called with how many ranks have joined.
        """
        self._meeting.open()
        seconds = start_deadline(os.environ, JOIN_DEADLINE)
        began, said = time.monotonic(), ""
        while not self._is_complete(machines := self._meeting.present()):
            check()
            waited = time.monotonic() - began
            text = " ".join(filter(None, [waiting_text(self._meeting.cluster, machines), self._meeting.refusal]))
            if text != said and waited > FIRST_NOTICE:
                said = text
                logger.info("%s", text)
                on_notice(text)
            if waited > seconds:
                raise TimeoutError(coded("AV-1905", self._late(machines, seconds)))
            time.sleep(JOIN_POLL)
        self._require_device(machines)
        self.machines = machines

    def take_again(self, check: Callable[[], None]) -> None:
        """Takes the same ranks again, with what they have loaded, if only connections to them were cut between jobs and
        all machines are here once more. Returns at the latest when it is clear that they will not be.

        check: called while waiting; it may raise.
        """
        until = time.monotonic() + AGAIN_DEADLINE
        while self._is_only_cut and time.monotonic() < until:
            machines = self._meeting.present()
            if self._is_complete(machines) and machines[0].groups == self.machines[0].groups:
                logger.info("Connections that were cut are there again; the ranks have kept what they had loaded.")
                self.machines = machines
                return
            check()
            time.sleep(JOIN_POLL)

    @property
    def _is_only_cut(self) -> bool:
        """Whether machines were lost, but no rank of them that is known of."""
        lost = [machine for machine in self.machines if machine.loss is not None] if self.lost else []
        return not self._stopped and bool(lost) and all(machine.is_cut for machine in lost)

    @property
    def links(self) -> list[RelayLink]:
        return self.machines

    @property
    def alive(self) -> bool:
        """Whether these ranks can run a job."""
        return bool(self.machines) and not self._stopped and not self.lost

    @property
    def lost(self) -> bool:
        """Whether a rank or a machine was lost."""
        for machine in self.machines:
            machine.look()  # a machine whose ranks have answered is not read by the job
        return any(machine.loss is not None for machine in self.machines)

    def doing(self, rank: int) -> str:
        """Where a rank is; what it does is not known here."""
        name = next(machine.name for machine in self.machines if rank in machine.ranks)
        return f"is on {name}"

    def died(self, doing: str) -> RankDied:
        """The error for a job that lost a machine or a rank."""
        death = host.advise(self._losses(), "AV-1906")
        return RankDied(
            f"{death}\nThis happened during: {doing}. The next job runs when torchrun has started the ranks again."
        )

    def stop(self) -> None:
        """Closes the connections. The ranks stay, with what they have loaded, for the next client."""
        self._stopped = True
        self._meeting.close()

    def abandon(self) -> None:
        """The same without waiting; called when the `Runtime` is garbage-collected."""
        self._stopped = True
        self._meeting.abandon()

    def kill(self) -> None:
        """Asks the machines to end their ranks, after a loss, or as they do not answer."""
        self._stopped = True
        reason = self._losses() or "Ranks did not answer in time."
        self._meeting.end(self.machines, reason)

    def _losses(self) -> str:
        return " ".join(dict.fromkeys(machine.loss for machine in self.machines if machine.loss is not None))

    def _is_complete(self, machines: list[RelayLink]) -> bool:
        """Whether all ranks have joined one group. Those of a group that has ended may still be connected."""
        groups = {rank: group for machine in machines for rank, group in machine.ready.items()}
        return len(groups) == self.world_size and len(set(groups.values())) == 1

    def _late(self, machines: list[RelayLink], seconds: float) -> str:
        refusal = self._meeting.refusal and f"\nA machine was refused: {self._meeting.refusal}"
        return late_text(self._meeting.cluster, machines, seconds) + refusal

    def _require_device(self, machines: list[RelayLink]) -> None:
        self.kind = machines[0].device
        if self._device not in ("auto", self.kind):
            raise coded_error(
                "AV-1904",
                f"device is {self._device!r}, but the machines of the cluster {self._meeting.cluster.name!r} have "
                f"{self.kind!r}. Set device to 'auto'.",
            )
