"""Where the machines of a cluster meet the client. It outlives groups of ranks: machines that come again find it."""

from __future__ import annotations

import logging
import os
import threading
import time

from ...specs.cluster import Cluster
from ...wire.envelopes import Hello
from ...wire.tls import read_key
from .greeting import rejection
from .listener import Listener
from .machine import RelayLink

logger = logging.getLogger(__name__)

LATELY = 60.0  # seconds; torchrun starts a refused machine's ranks again in less
LEAVE_DEADLINE = 1.0  # seconds for machines to end their ranks


class Meeting:
    """The machines of a cluster that are connected. The listener's thread adds them, and closes them when it ends."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._refusal, self._refused_at = "", 0.0
        self._machines: list[RelayLink] = []
        self._ended: set[str] = set()  # the names of groups that were ended
        self._one_at_a_time = threading.Lock()
        self._listener: Listener | None = None
        self._pid = os.getpid()  # to recognise a forked child, whose connections these are not

    def open(self) -> None:
        """Listens, unless it does already. Raises ValueError for a key or an address that cannot be used."""
        if self._listener is None or not self._listener.alive:
            self._listener = Listener(self.cluster, read_key(self.cluster.key), self._admit, self._close_machines)

    def present(self) -> list[RelayLink]:
        """The machines that are connected, in the order of their ranks."""
        with self._one_at_a_time:
            self._look()
            late = [machine for machine in self._machines if self._ended.intersection(machine.ready.values())]
            present = sorted((machine for machine in self._machines if machine not in late), key=lambda one: one.ranks)
        if late:  # their connections were cut when their group was ended; torchrun there still takes it for whole
            self.end(late, "its group has lost other ranks.")
        return present

    def end(self, machines: list[RelayLink], reason: str) -> None:
        """Asks machines to end the ranks of their group, for this reason, and closes their connections."""
        with self._one_at_a_time:
            self._machines = [machine for machine in self._machines if machine not in machines]
            self._ended.update(*(machine.ready.values() for machine in machines))
        _dismiss(machines, reason)

    def close(self) -> None:
        """Closes all connections; the machines' ranks wait for the next client."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def abandon(self) -> None:
        """The same without waiting, in any thread; called when the `Runtime` is garbage-collected."""
        if self._listener is not None and os.getpid() == self._pid:
            self._listener.end()

    @property
    def refusal(self) -> str:
        """Why a machine was rejected lately; empty if none was since the last one was welcomed."""
        return self._refusal if time.monotonic() - self._refused_at < LATELY else ""

    def _admit(self, machine: RelayLink, hello: Hello) -> None:
        with self._one_at_a_time:
            self._look()
            rejected = rejection(hello, self.cluster, self._machines)
            if rejected is None:
                machine.welcome(hello, self.cluster.paths.get(hello.machine, {}))
                self._machines.append(machine)
                self._refusal = ""
                logger.info("The machine %s has connected, for the ranks %s.", machine.name, machine.ranks)
                return
        if rejected.reason != self.refusal:  # a machine asks again and again
            logger.warning("A machine was refused. %s", rejected.reason)
        self._refusal, self._refused_at = rejected.reason, time.monotonic()
        machine.reject(rejected)

    def _look(self) -> None:
        """Leaves out machines that were lost. Those at work are left to their job."""
        for machine in self._machines:
            machine.look()
        self._machines = [machine for machine in self._machines if machine.loss is None]

    def _close_machines(self) -> None:
        with self._one_at_a_time:
            machines, self._machines = self._machines, []
        for machine in machines:
            machine.close()


def _dismiss(machines: list[RelayLink], reason: str) -> None:
    for machine in machines:
        machine.leave(reason)
    deadline = time.monotonic() + LEAVE_DEADLINE
    for machine in machines:
        machine.farewell(deadline)
