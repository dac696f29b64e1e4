"""The ranks of a machine, as its relay sees them."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
from collections.abc import Iterable, Iterator

import msgspec

from ....hardware.processes import start_of
from ....wire.control import Heading, Message
from ....wire.packets import ChannelClosed, Packet, Packets, Undecodable, header
from .settings import Arrival, RelaySettings, peer_of

logger = logging.getLogger(__name__)

ANSWERS = ("Done", "Failed")
_heading = msgspec.msgpack.Decoder(Heading)
_arrival = msgspec.msgpack.Decoder(Arrival)


class Delivery:
    """A message on its way to ranks. It owns the descriptors of its memory."""

    def __init__(self, body: bytes, block_size: int = 0, descriptors: Iterable[int] = ()):
        self.descriptors = list(descriptors)
        self.data = header(body, block_size, len(self.descriptors)) + body

    def __del__(self):
        while self.descriptors:
            os.close(self.descriptors.pop())


class LocalRank:
    """A rank that has connected. process: its id. ready: the body of its message Ready, once it has come. job: the
    number of the job that it has not answered; 0: none."""

    def __init__(self, number: int, process: int, packets: Packets):
        self.number = number
        self.process = process
        self._began = start_of(process)
        self.packets = packets
        self.ready: bytes | None = None
        self.job = 0
        self._on_the_way: list[Delivery] = []  # open until they are sent

    def post(self, delivery: Delivery) -> None:
        """Raises ChannelClosed."""
        self._on_the_way.append(delivery)
        self.packets.post(delivery.data, list(delivery.descriptors))
        self._release()

    def say(self, message: Message) -> None:
        """Posts a message without tensors. Raises ChannelClosed."""
        self.post(Delivery(msgspec.msgpack.encode(message)))

    def flush(self) -> None:
        self.packets.flush()
        self._release()

    def _release(self) -> None:
        if not self.packets.unsent:
            self._on_the_way.clear()

    def read(self, packet: Packet) -> Heading:
        """What a packet of the rank is, and what it says of the rank."""
        try:
            heading = _heading.decode(packet.body)
        except msgspec.MsgspecError:
            return Heading(type="")  # the client finds out what is wrong with it
        if heading.type == "Ready":
            self.ready = packet.body
        elif heading.type in ANSWERS and heading.job in (self.job, 0):
            self.job = 0
        return heading

    def kill(self) -> None:
        """Ends its process, and no other one that has its number by now, as when a child keeps its connection open."""
        if self._began is None or start_of(self.process) != self._began:
            return
        try:
            os.kill(self.process, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended at this moment


class LocalRanks:
    """All ranks of the machine. Those that have connected are in `here`, by number."""

    def __init__(self, settings: RelaySettings):
        self._parent = settings.parent
        self._expected = range(settings.first, settings.first + settings.ranks)
        self._listener: socket.socket | None = socket.socket(fileno=settings.listener)
        self._listener.setblocking(False)
        self._coming: dict[int, tuple[Packets, int]] = {}  # by descriptor; connected, but without a number so far
        self.here: dict[int, LocalRank] = {}
        self.first_has_gone = False

    @property
    def idle(self) -> bool:
        """Whether no rank has a job to answer."""
        return not any(rank.job for rank in self.here.values())

    @property
    def settled(self) -> bool:
        """Whether all ranks are ready, and idle."""
        return self.idle and len(self.here) == len(self._expected) and all(rank.ready for rank in self.here.values())

    def watched(self, read: bool) -> Iterator[tuple[int, int]]:
        """(descriptor, events) to poll. read: whether messages of ranks are wanted now; deaths always are."""
        if self._listener is not None:
            yield self._listener.fileno(), select.POLLIN
        yield from ((descriptor, select.POLLIN) for descriptor in self._coming)
        for rank in self.here.values():
            events = (select.POLLIN if read else 0) | (select.POLLOUT if rank.packets.unsent else 0)
            yield rank.packets.fileno(), events

    def arrived(self, ready: dict[int, int]) -> Iterator[LocalRank]:
        """Ranks that have connected. ready: descriptor -> events, of poll."""
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept()
        for descriptor in [descriptor for descriptor in self._coming if descriptor in ready]:
            packets, process = self._coming[descriptor]
            try:
                packet = packets.take()
                number = None if packet is None else _arrival.decode(packet.body).rank
            except (ChannelClosed, Undecodable, msgspec.MsgspecError):
                del self._coming[descriptor]
                packets.close()
                continue
            if number is not None:
                del self._coming[descriptor]
                yield from self._admit(number, process, packets)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        process, user = peer_of(connection)
        if may_connect(user):
            self._coming[connection.fileno()] = Packets(connection), process
        else:
            connection.close()

    def _admit(self, number: int, process: int, packets: Packets) -> Iterator[LocalRank]:
        if number not in self._expected or number in self.here:
            packets.close()
            return
        rank = LocalRank(number, process, packets)
        try:
            rank.post(Delivery(b""))  # an answer, so that it knows that it has found a relay
        except ChannelClosed:
            packets.close()
            return
        self.here[number] = rank
        if len(self.here) == len(self._expected):
            self._listener.close()
            self._listener = None
        yield rank

    def remove(self, rank: LocalRank) -> None:
        rank.packets.close()
        del self.here[rank.number]
        self.first_has_gone |= rank.process == self._parent

    def in_order(self) -> list[LocalRank]:
        """With the first one last, as the relay ends with it."""
        return sorted(self.here.values(), key=lambda rank: (rank.process == self._parent, rank.number))

    def kill(self) -> None:
        """Ends all ranks; torchrun starts them again."""
        for rank in self.in_order():
            rank.kill()


def may_connect(user: int) -> bool:
    """Whether a process of this user may be a rank: the relay's own one."""
    return user == os.getuid()
