"""The machine's connection to the client: made again and again, until a client welcomes the machine."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator

from ....errors import code_of, coded
from ....hardware.versions import OWN_NAME, package_versions, versions
from ....specs.cluster import address_of
from ....wire.envelopes import PROTOCOL, Envelope, Hello, Rejected, Welcome
from ....wire.link import Link, LinkClosed, keep_alive
from ....wire.tls import Handshake, Key
from .settings import RelaySettings

logger = logging.getLogger(__name__)

OPEN_DEADLINE = 10.0  # seconds for TCP and TLS
ANSWER_DEADLINE = 15.0  # seconds for the client to answer a Hello
PAUSE = 0.5  # seconds between attempts
USER_TIMEOUT = 30.0  # seconds without an acknowledgement until the connection counts as lost


class LastingRefusal(Exception):
    """The client has refused this machine, and will refuse it again."""


class PassingRefusal(ConnectionRefusedError):
    """The client has refused this machine, and may take it later."""


class ClientConnection:
    """The connection to the client, if there is one. Its states, in order: none; being opened (`_opening`): TCP, then
    TLS; waiting for the answer to Hello; welcomed.

    place: see `wire.link.Link`.
    """

    def __init__(self, settings: RelaySettings, key: Key, place: Callable[[Envelope], list[memoryview]]):
        self._settings, self._key, self._place = settings, key, place
        self._hello = _hello(settings)
        self._opening: socket.socket | Handshake | None = None
        self._link: Link | None = None
        self._welcomed = False
        self._deadline = 0.0  # of the attempt
        self._next_attempt = 0.0
        self._attempts = 0
        self._said = ""  # the last reason why there is no client

    @property
    def welcomed(self) -> bool:
        return self._welcomed

    @property
    def unsent_bytes(self) -> int:
        return self._link.unsent_bytes if self._link is not None else 0

    @property
    def waiting(self) -> bool:
        """Whether there is something to do that `poll` does not show."""
        return self._link is not None and self._link.waiting

    def watched(self) -> Iterator[tuple[int, int]]:
        """(descriptor, events) to poll."""
        if self._link is not None:
            yield self._link.fileno(), select.POLLIN | (select.POLLOUT if self._link.unsent else 0)
        elif isinstance(self._opening, Handshake):
            yield self._opening.fileno(), self._opening.events
        elif self._opening is not None:
            yield self._opening.fileno(), select.POLLOUT

    def post(self, envelope: Envelope, *payload) -> None:
        """Sends to the client, if one has welcomed this machine. A connection that is lost then shows in `advance`."""
        if self._welcomed:
            self._link.post(envelope, *payload)

    def advance(self, may_open: bool) -> Iterator[Envelope | None]:
        """Does what can be done without waiting. Yields the client's envelopes, a Welcome first, and None when a client
        that has welcomed this machine is lost. Raises LastingRefusal.

        may_open: whether this is a time for a new attempt.
        """
        try:
            if self._link is not None:
                yield from self._received()
            elif self._opening is not None:
                self._open_further()
            elif may_open and time.monotonic() >= self._next_attempt:
                self._open()
            if not self._welcomed and self._is_open and time.monotonic() > self._deadline:
                raise TimeoutError("it does not answer")
        except (OSError, LinkClosed, ValueError) as error:
            was_welcomed = self._welcomed
            self._explain(error)
            self.close()
            if was_welcomed:
                yield None

    def close(self) -> None:
        for connection in (self._link, self._opening):
            if connection is not None:
                connection.close()
        self._link, self._opening, self._welcomed = None, None, False
        self._next_attempt = time.monotonic() + PAUSE

    @property
    def _is_open(self) -> bool:
        return self._link is not None or self._opening is not None

    def _received(self) -> Iterator[Envelope]:
        self._link.flush()
        while self._link is not None and (envelope := self._link.take()) is not None:
            if self._welcomed:
                yield envelope
            elif isinstance(envelope, Welcome):
                self._welcomed, self._said = True, ""
                logger.info("The client at %s has welcomed this machine.", self._settings.client)
                yield envelope
            elif isinstance(envelope, Rejected):
                if envelope.lasting:
                    raise LastingRefusal(envelope.reason)
                raise PassingRefusal(envelope.reason)
            else:
                raise ValueError(f"it answers with {type(envelope).__name__}")

    def _open(self) -> None:
        """Begins an attempt. The look-up of a name may block for seconds; no rank works meanwhile."""
        self._deadline = time.monotonic() + OPEN_DEADLINE
        addresses = socket.getaddrinfo(*address_of(self._settings.client), type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = addresses[self._attempts % len(addresses)]
        self._attempts += 1
        self._opening = socket.socket(family, kind, protocol)
        self._opening.setblocking(False)
        keep_alive(self._opening, USER_TIMEOUT)
        _require_possible(self._opening.connect_ex(address))

    def _open_further(self) -> None:
        if not isinstance(self._opening, Handshake):
            if not _is_connected(self._opening):
                return
            self._opening = Handshake(self._opening, self._key, server=False)
        if (established := self._opening.step()) is not None:
            self._link, self._opening = Link(established, self._place), None
            self._deadline = time.monotonic() + ANSWER_DEADLINE
            self._link.post(self._hello)

    def _explain(self, error: Exception) -> None:
        """Logs why there is no client, once for each reason."""
        client = self._settings.client
        if self._welcomed:
            text = f"The client at {client} is gone ({error}). Ranks wait for the next one."
        elif isinstance(error, PassingRefusal):
            text = f"The client at {client} cannot take this machine now: {error} Ranks ask again."
        elif code_of(error):
            key = f"The key file {self._settings.key} is not the one of the client at {client}"
            text = coded("AV-1909", f"{key}: {error} Ranks wait for a client with the same one.")
        else:
            text = f"No client at {client} so far ({error}). Ranks wait."
        if text != self._said:
            logger.info("%s", text)
        self._said = text


def _require_possible(error: int) -> None:
    if error not in (0, errno.EINPROGRESS):
        raise OSError(error, os.strerror(error))


def _is_connected(plain: socket.socket) -> bool:
    """Raises OSError if it cannot be."""
    _require_possible(plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    try:
        peer = plain.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    if peer == plain.getsockname():  # TCP connects a port to itself if it is chosen for both sides
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return True


def _hello(settings: RelaySettings) -> Hello:
    return Hello(
        pack=versions()[OWN_NAME],
        protocol=PROTOCOL,
        machine=settings.machine,
        ranks=tuple(range(settings.first, settings.first + settings.ranks)),
        world_size=settings.world_size,
        device=settings.device,
        packages=package_versions(),
    )
