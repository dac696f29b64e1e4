"""The relay's loop: one thread, which waits in `poll` only."""

from __future__ import annotations

import logging
import select
import time

import msgspec

from ....errors import coded
from ....hardware import memory
from ....wire.control import Cancel, Located, Shutdown, Wrote
from ....wire.envelopes import Deliver, Envelope, FromRank, Gone, Here, Leave, Welcome
from ....wire.memory import blocks
from ....wire.packets import ChannelClosed, Packet, Undecodable
from ....wire.tls import Key
from .arriving import Arriving, LentMemory
from .connection import ClientConnection, LastingRefusal
from .ranks import Delivery, LocalRank, LocalRanks
from .regions import content_of, region_of
from .settings import RelaySettings, pause_before_failing

logger = logging.getLogger(__name__)

LONGEST_POLL = 0.5  # seconds
MOST_UNSENT = 1 << 26  # bytes for the client that wait to be sent, from which on ranks wait too
# Seconds for ranks to end a job whose client is gone. A link that is cut shows after 30 s (USER_TIMEOUT), and ranks
# that wait for others beyond it are gone within a minute.
ABANDONED_DEADLINE = 20.0
LAST_WORDS = 1.0  # seconds in which the relay reports the death of the rank that it ends with
_wrote = msgspec.msgpack.Decoder(Wrote)


class Relay:
    """Passes messages between the client and this machine's ranks, and ends ranks."""

    def __init__(self, settings: RelaySettings, key: Key):
        self._settings = settings
        self._ranks = LocalRanks(settings)
        self._client = ClientConnection(settings, key, self._place)
        self._arriving: Arriving | None = None
        self._lent: list[LentMemory] = []  # of the job that runs
        self._kills_before = 0  # by the kernel, when that job began
        self._cancel_until: float | None = None  # when ranks must have ended the job of a client that is gone
        self._without_client_since = time.monotonic()
        self._paths: dict[str, str] = {}
        self._last_words_until: float | None = None
        self._ended = False

    def run(self) -> None:
        """Returns when the ranks have been ended, or the first of them has."""
        while not self._ended:
            try:
                self._turn()
            except LastingRefusal as error:
                logger.error("The client at %s refuses this machine: %s", self._settings.client, error)
                self._client.close()
                self._pause()
                return  # the ranks notice, and end with exit code 1
        self._client.close()

    def end_soon(self) -> None:
        """To be called when the first rank has ended."""
        self._last_words_until = time.monotonic() + LAST_WORDS

    def _pause(self) -> None:
        until = time.monotonic() + pause_before_failing(self._settings.restart)
        while time.monotonic() < until and self._last_words_until is None:
            time.sleep(LONGEST_POLL)

    def _turn(self) -> None:
        ready = self._wait()
        for rank in self._ranks.arrived(ready):
            self._greet(rank)
        for rank in [*self._ranks.here.values()]:
            if events := ready.get(rank.packets.fileno()):
                self._serve(rank, events)
        for envelope in self._client.advance(may_open=self._ranks.idle and not self._ranks.first_has_gone):
            self._of_client(envelope)
        self._look_at_the_clock()

    def _wait(self) -> dict[int, int]:
        poll = select.poll()
        for descriptor, events in (*self._ranks.watched(read=self._reads), *self._client.watched()):
            poll.register(descriptor, events)
        return dict(poll.poll(0 if self._client.waiting else 1000 * LONGEST_POLL))

    @property
    def _reads(self) -> bool:
        """Whether messages of ranks are read now. Otherwise they wait in their sockets: so memory stays bounded when
        ranks make results faster than the client takes them."""
        return self._client.unsent_bytes < MOST_UNSENT

    # Ranks

    def _greet(self, rank: LocalRank) -> None:
        logger.info("Rank %d has connected; %d of %d.", rank.number, len(self._ranks.here), self._settings.ranks)
        if self._client.welcomed:
            self._introduce(rank)

    def _introduce(self, rank: LocalRank) -> None:
        """To the client, and the client to it."""
        try:
            rank.say(Located(machine=self._settings.machine, paths=self._paths))
        except ChannelClosed:
            return self._lose(rank)
        self._client.post(Here(rank=rank.number))
        if rank.ready is not None:
            self._client.post(FromRank(rank=rank.number, body=len(rank.ready)), rank.ready)

    def _serve(self, rank: LocalRank, events: int) -> None:
        try:
            rank.flush()
            while self._reads and (packet := rank.packets.take()) is not None:
                self._of_rank(rank, packet)
            if not self._reads and events & (select.POLLHUP | select.POLLERR):
                self._lose(rank)
        except (ChannelClosed, Undecodable):
            self._lose(rank)

    def _of_rank(self, rank: LocalRank, packet: Packet) -> None:
        heading = rank.read(packet)
        if heading.type == "Wrote":
            return self._pass_region(rank, packet)
        block = packet.map_block()
        packet.close()
        if self._client.welcomed:
            tensors = memoryview(block) if block is not None else b""
            envelope = FromRank(rank=rank.number, body=len(packet.body), block=len(tensors))
            self._client.post(envelope, packet.body, tensors)
        if self._ranks.idle:
            self._lent = []

    def _pass_region(self, rank: LocalRank, packet: Packet) -> None:
        try:
            wrote = _wrote.decode(packet.body)
            if not self._client.welcomed:
                return
            region = region_of(wrote)
            self._client.post(region, *content_of(region, self._lent[wrote.lent].view))
        except (msgspec.MsgspecError, ValueError, IndexError) as error:
            logger.error("Rank %d reports an invalid part of a result: %s", rank.number, error)
            rank.kill()

    def _lose(self, rank: LocalRank) -> None:
        logger.warning("Rank %d is gone.", rank.number)
        self._ranks.remove(rank)
        self._client.post(Gone(rank=rank.number, by_kernel=memory.kills() > self._kills_before))

    # The client

    def _of_client(self, envelope: Envelope | None) -> None:
        if envelope is None:
            self._lose_client()
        elif isinstance(envelope, Welcome):
            self._paths = envelope.paths
            for rank in [*self._ranks.here.values()]:
                self._introduce(rank)
        elif isinstance(envelope, Deliver):
            self._deliver(envelope)
        elif isinstance(envelope, Leave):
            logger.warning("The client asks this machine to end its ranks: %s", envelope.reason)
            self._kill()

    def _place(self, envelope: Envelope) -> list[memoryview] | None:
        """Where the payload of an envelope is to be received: tensors in memory that the ranks can map. None if there
        is not enough memory."""
        if not isinstance(envelope, Deliver):
            raise Undecodable(f"It sends {type(envelope).__name__} with a payload.")
        try:
            self._arriving = Arriving(envelope)
        except (OSError, MemoryError) as error:
            logger.error("%s", _no_memory(envelope, error))
            self._arriving = None
            return None
        return self._arriving.places

    def _deliver(self, envelope: Deliver) -> None:
        arrived, self._arriving = self._arriving, None
        ranks = [self._ranks.here[number] for number in envelope.ranks if number in self._ranks.here]
        if envelope.job:
            self._lent, self._kills_before = arrived.lent if arrived else [], memory.kills()
        if arrived is None:
            return self._answer_for(ranks, envelope)
        delivery = arrived.delivery()
        for rank in ranks:
            rank.job = envelope.job or rank.job
            self._say(rank, delivery)

    def _answer_for(self, ranks: list[LocalRank], envelope: Deliver) -> None:
        """In place of ranks that cannot get a message."""
        text = _no_memory(envelope, "out of memory")
        failed = {"type": "Failed", "job": envelope.job, "kind": "user", "error": text, "traceback": ""}
        body = msgspec.msgpack.encode(failed)
        for rank in ranks:
            self._client.post(FromRank(rank=rank.number, body=len(body)), body)

    def _say(self, rank: LocalRank, delivery: Delivery) -> None:
        try:
            rank.post(delivery)
        except ChannelClosed:
            self._lose(rank)

    def _lose_client(self) -> None:
        self._without_client_since = time.monotonic()
        self._arriving = None
        blocks.forget()
        for rank in [rank for rank in self._ranks.here.values() if rank.job]:
            self._cancel_until = time.monotonic() + ABANDONED_DEADLINE
            self._say(rank, Delivery(msgspec.msgpack.encode(Cancel(job=rank.job))))

    # Time

    def _look_at_the_clock(self) -> None:
        now, wait = time.monotonic(), self._settings.wait
        if self._last_words_until is not None and (now > self._last_words_until or self._has_said_all):
            self._ended = True
        elif self._ranks.idle:
            self._cancel_until = None
            if wait and not self._client.welcomed and now - self._without_client_since > wait and self._ranks.settled:
                self._end_quietly()
        elif self._cancel_until is not None and now > self._cancel_until:
            logger.error("Ranks have not ended the job of a client that is gone, within %.0f s.", ABANDONED_DEADLINE)
            self._kill()

    @property
    def _has_said_all(self) -> bool:
        return self._ranks.first_has_gone and not self._client.unsent_bytes

    def _kill(self) -> None:
        self._ranks.kill()
        self._ended = True

    def _end_quietly(self) -> None:
        """Ends the ranks with exit code 0, which torchrun takes for the end of their work."""
        text = f"No client came to {self._settings.client} within {self._settings.wait:.0f} s: the ranks end."
        logger.info("%s", coded("AV-1910", text))
        for rank in self._ranks.in_order():
            self._say(rank, Delivery(msgspec.msgpack.encode(Shutdown())))
        self._ended = True


def _no_memory(envelope: Deliver, error: Exception | str) -> str:
    needed = (envelope.body + envelope.block + sum(envelope.lent)) / 1e9
    return coded("AV-1208", f"A job's tensors and results need {needed:.1f} GB of this machine's memory ({error}).")
