"""Listens at a cluster's address, and lets those in who have its key.

Whoever connects is a stranger until TLS has shown the opposite: nothing that it sends is read before, and it costs
little. One thread serves all, and never waits for one of them.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from ...errors import coded_error
from ...specs.cluster import Cluster
from ...wire.channel import ChannelClosed
from ...wire.envelopes import Hello
from ...wire.link import keep_alive
from ...wire.tls import Handshake, Key
from .machine import RelayLink

logger = logging.getLogger(__name__)

MOST_PENDING = 64  # connections that have not said Hello
DEADLINE = 5.0  # seconds for TLS, and again for Hello
MOST_STEPS = 64  # times that data of a connection is looked at until it has said Hello; an honest one needs about 6
# Each turn, the thread does a little and rests, so that no number of strangers keeps a core busy: at most 400
# connections a second are accepted, and 400 begin TLS, which takes most of a turn's time.
PACE = 0.005  # seconds
MOST_A_TURN = 2
BACKLOG = 128
LAST_SECOND = 1.0  # in which a listener that nobody holds any more closes its socket
CONFIRMED_WITHIN = 8.0  # seconds without an acknowledgement until a machine counts as lost
MINUTE = 60.0  # seconds in which an address gets one line in the log
MOST_LINES = 20  # in a minute, from all addresses


class Listener:
    """A listening socket and its thread. Raises ValueError if the address cannot be listened at.

    admit: called in the thread for each machine that has said Hello; welcomes or rejects it. at_end: called in the
    thread when it ends.
    """

    def __init__(
        self, cluster: Cluster, key: Key, admit: Callable[[RelayLink, Hello], None], at_end: Callable[[], None]
    ):
        self._key, self._admit, self._at_end = key, admit, at_end
        self._complaints = _Complaints(cluster.name)
        self._pending: list[_Newcomer] = []  # the oldest is first
        self._socket = _listening(cluster)
        self._ended = False
        self._awake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ascend-machines", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    def end(self) -> None:
        """Lets the thread end, which closes everything. Does not wait, so a finalizer can call it in any thread."""
        if not self._ended:
            self._ended = True
            _close(self._waker)

    def close(self) -> None:
        self.end()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended:
                self._turn()
                time.sleep(PACE)
        finally:
            for newcomer in self._pending:
                newcomer.close()
            _close(self._socket)
            self._at_end()
            self._awake.close()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._awake, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        for newcomer in self._pending:
            poll.register(newcomer.fileno(), newcomer.events)
        ready = {descriptor for descriptor, _ in poll.poll(self._patience())}
        moving = [newcomer for newcomer in self._pending if newcomer.fileno() in ready]
        if self._socket.fileno() in ready:
            self._accept()
        for newcomer in self._in_turn(moving):
            if newcomer in self._pending:
                self._advance(newcomer)
        for newcomer in [newcomer for newcomer in self._pending if time.monotonic() > newcomer.until]:
            self._drop(newcomer, f"it did not {newcomer.stage} within {DEADLINE:.0f} s")

    def _patience(self) -> float | None:
        """Milliseconds until the next deadline."""
        if not self._pending:
            return None
        return max(0.0, min(newcomer.until for newcomer in self._pending) - time.monotonic()) * 1000 + 1

    def _accept(self) -> None:
        for _ in range(MOST_A_TURN):
            try:
                connection, address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # such as too many open files, which may be over soon
                self._complaints.say("any address", f"no connection can be accepted ({error.strerror})")
                return
            self._pending.append(_Newcomer(connection, str(address[0])))
            if len(self._pending) > MOST_PENDING:
                self._drop(self._least_wanted(), "too many connect at once")

    def _least_wanted(self) -> _Newcomer:
        """The oldest one of the address with the most, so that one stranger does not displace a machine elsewhere."""
        counts = Counter(newcomer.address for newcomer in self._pending)
        return max(self._pending, key=lambda newcomer: counts[newcomer.address])  # the first of equal ones

    def _in_turn(self, moving: list[_Newcomer]) -> list[_Newcomer]:
        """Those that go on now: all that have begun TLS, and few others, first those of addresses with few."""
        counts = Counter(newcomer.address for newcomer in self._pending)
        silent = sorted((one for one in moving if one.is_silent), key=lambda newcomer: counts[newcomer.address])
        return [one for one in moving if not one.is_silent] + silent[:MOST_A_TURN]

    def _advance(self, newcomer: _Newcomer) -> None:
        try:
            hello = newcomer.advance(self._key)
            if hello is not None:
                self._admit(newcomer.machine, hello)
                self._pending.remove(newcomer)
        except (OSError, ValueError, ChannelClosed) as error:
            self._drop(newcomer, str(error))

    def _drop(self, newcomer: _Newcomer, reason: str) -> None:
        self._pending.remove(newcomer)
        newcomer.close()
        self._complaints.say(newcomer.address, reason)


class _Newcomer:
    """A connection that has not said Hello. machine: once it has shown that it has the key.

    It gets what TLS needs, some 100 KB, when its first bytes arrive.
    """

    def __init__(self, connection: socket.socket, address: str):
        self.address = address
        self.until = time.monotonic() + DEADLINE
        self.machine: RelayLink | None = None
        self._connection: socket.socket | Handshake | None = connection
        self._steps = 0
        connection.setblocking(False)

    def fileno(self) -> int:
        return (self.machine or self._connection).fileno()

    @property
    def is_silent(self) -> bool:
        return isinstance(self._connection, socket.socket)

    @property
    def events(self) -> int:
        return self._connection.events if isinstance(self._connection, Handshake) else select.POLLIN

    @property
    def stage(self) -> str:
        return "say Hello" if self.machine is not None else "begin TLS" if self.is_silent else "end the TLS handshake"

    def advance(self, key: Key) -> Hello | None:
        """Goes on without waiting; its Hello, once it has come. Raises OSError, ValueError or ChannelClosed."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise ValueError("it sends its first words in too many pieces")
        if self.is_silent:
            self._connection = Handshake(self._connection, key, server=True)
        if self.machine is None and (established := self._connection.step()) is not None:
            keep_alive(established, CONFIRMED_WITHIN)
            self.machine, self._connection = RelayLink(established), None
            self.until = time.monotonic() + DEADLINE
        return None if self.machine is None else self.machine.greet()

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()
        elif isinstance(self._connection, Handshake):
            self._connection.close()
        else:
            _close(self._connection)


class _Complaints:
    """Lines in the log about connections that were refused: one a minute for each address, and few in all."""

    def __init__(self, cluster: str):
        self._cluster = cluster
        self._said: dict[str, float] = {}  # address -> when

    def say(self, address: str, reason: str) -> None:
        now = time.monotonic()
        self._said = {one: at for one, at in self._said.items() if now - at < MINUTE}
        if address in self._said or len(self._said) >= MOST_LINES:
            return
        self._said[address] = now
        logger.warning("A connection from %s to the cluster %s was refused: %s.", address, self._cluster, reason)


def _listening(cluster: Cluster) -> socket.socket:
    host, port = cluster.address
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise coded_error("AV-1908", _unusable(cluster, error)) from None
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended lately do not matter
        _bind(listening, address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise coded_error("AV-1908", _unusable(cluster, error)) from None
    if cluster.risk is not None:
        logger.warning("The cluster %s listens at %s: %s. Strangers are refused, but give an address in the machines' "
                       "own network.", cluster.name, cluster.listen, cluster.risk)  # fmt: skip
    return listening


def _bind(listening: socket.socket, address: tuple) -> None:
    until = time.monotonic() + LAST_SECOND
    while True:
        try:
            return listening.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
        time.sleep(PACE)


def _unusable(cluster: Cluster, error: OSError) -> str:
    causes = {
        errno.EADDRINUSE: "Another program listens there, or another Runtime with this cluster: end it (ss -ltnp shows "
                          "its process), or choose another port.",
        errno.EADDRNOTAVAIL: "It is not an address of this host: give one that `ip address` shows.",
        errno.EACCES: "Ports below 1024 are not for every user: choose another one.",
    }  # fmt: skip
    cause = causes.get(error.errno, "Give an address of this host in the cluster's file.")
    return f"The client cannot listen at {cluster.listen} for the cluster {cluster.name!r} ({error.strerror}). {cause}"


def _close(connection: socket.socket) -> None:
    """Also for a process that was forked meanwhile, and has a copy of the descriptor."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
    connection.close()
