"""The link to one machine: messages of a job go there once for all its ranks, and their answers come back.

A machine has the cluster's key. What it sends is checked nevertheless, as it may be of another release, or broken.
"""

from __future__ import annotations

import logging
import mmap
import select
import socket
import threading
import time
from collections.abc import Collection

from ...hardware import host
from ...wire import messages
from ...wire.channel import ChannelClosed, SealedMessage
from ...wire.envelopes import Deliver, Envelope, FromRank, Gone, Hello, Here, Leave, Region, Rejected, Welcome
from ...wire.link import Link, LinkClosed
from ...wire.messages import Done, Failed, Message, Ready, Undecodable
from ...wire.packets import MAX_BODY
from ..rank_words import ranks_in_words
from .lent import LentForResult

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 1000  # envelopes that one look reads, so that a machine which never ends does not hold up the client
MOST_TENSORS = 1 << 36  # bytes of the tensors of one message of a rank; a long video's latent has 1,000 times fewer


class RelayLink:
    """A machine's connection, and what its ranks have said of themselves.

    It is a `links.RankLink`, which a job's thread reads while the job runs; at other times `look` does, in any thread.

    sock: of TLS, established with a side that has the key. here: ranks that have connected to the machine's relay.
    ready: the name of its group, by rank that has joined one. loss: a sentence why the ranks cannot work on; None while
    they can.
    """

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._link = Link(sock, self._place)
        self._one_at_a_time = threading.RLock()
        self.hello = Hello(pack="", protocol=0)
        self.ranks: tuple[int, ...] = ()
        self.here: set[int] = set()
        self.ready: dict[int, str] = {}
        self.loss: str | None = None
        self._job = 0  # that its ranks have not all answered
        self._unanswered: set[int] = set()
        self._lent: list[LentForResult] = []
        self._body = self._block = b""  # the payload of the message that arrives
        self._leaves = False

    @property
    def name(self) -> str:
        return self.hello.machine

    @property
    def device(self) -> str:
        return self.hello.device

    @property
    def groups(self) -> set[str]:
        """The names of its ranks' groups; one, if all are ready and belong together."""
        return {*self.ready.values()}

    @property
    def is_cut(self) -> bool:
        """Whether its connection was lost, but none of its ranks as far as is known."""
        return self.loss is not None and not self._is_open

    # The first words

    def greet(self) -> Hello | None:
        """The machine's Hello, once it has arrived. Raises ChannelClosed, and Undecodable for anything else."""
        envelope = self._envelope()
        if envelope is not None and not isinstance(envelope, Hello):
            raise Undecodable(f"its first envelope is {type(envelope).__name__}")
        return envelope

    def welcome(self, hello: Hello, paths: dict[str, str]) -> None:
        self.hello, self.ranks = hello, tuple(sorted(hello.ranks))
        self._link.post(Welcome(paths=paths))

    def reject(self, rejected: Rejected) -> None:
        self._link.post(rejected)
        self.close()

    @property
    def _is_open(self) -> bool:
        return self.fileno() >= 0

    # Between jobs

    def look(self) -> None:
        """Reads what the machine has sent while no job runs on it: that ranks are here, ready or gone."""
        if not self._one_at_a_time.acquire(blocking=False):
            return  # somebody else reads it
        try:
            for _ in range(MOST_AT_ONCE):
                if self._job or self.loss is not None or not self._readable():
                    return
                self.take()
        except ChannelClosed:
            pass  # `loss` says why
        except Undecodable as error:
            self._lose(self._lost(error))
        finally:
            self._one_at_a_time.release()

    def _readable(self) -> bool:
        if not self._is_open:
            return True  # `take` says so
        poll = select.poll()
        poll.register(self._link.fileno(), select.POLLIN)
        return self._link.waiting or bool(poll.poll(0))

    # A job

    def fileno(self) -> int:
        return self._link.fileno()

    @property
    def unsent(self) -> bool:
        return self._link.unsent

    @property
    def waiting(self) -> bool:
        return self._link.waiting

    def post(self, sealed: SealedMessage, ranks: Collection[int], job: int = 0) -> None:
        receivers = tuple(rank for rank in self.ranks if rank in ranks)
        if not receivers:
            return
        with self._one_at_a_time:
            if self.loss is not None:
                raise ChannelClosed(self.loss)
            if job:
                self._job, self._unanswered = job, set(receivers)
                self._lent = [LentForResult(shared) for shared in sealed.lent]
            sizes = {"body": len(sealed.body), "block": len(sealed.block)}
            lent = tuple(shared.nbytes for shared in sealed.lent)
            self._link.post(Deliver(ranks=receivers, job=job, lent=lent, **sizes), sealed.body, sealed.block)

    def flush(self) -> None:
        with self._one_at_a_time:
            if self._is_open:
                self._link.flush()

    def take(self) -> tuple[int, Message] | None:
        with self._one_at_a_time:
            if self.loss is not None:
                raise ChannelClosed(self.loss)
            try:
                envelope = self._envelope()
                return None if envelope is None else self._read(envelope)
            except Undecodable as error:
                raise Undecodable(f"The machine {self.name} sent invalid data. {error}") from None

    def _envelope(self) -> Envelope | None:
        if not self._is_open:  # also after an interrupt, Ctrl+C, while it was read
            self._lose(f"The connection to the machine {self.name} was closed.")
            raise ChannelClosed(self.loss)
        try:
            return self._link.take()
        except LinkClosed as error:
            self._lose(self._lost(error))
            raise ChannelClosed(str(error)) from None
        except BaseException as error:  # it has closed the connection, so that nothing more can come
            self._lose(self._lost(error))
            raise

    def _read(self, envelope: Envelope) -> tuple[int, Message] | None:
        if isinstance(envelope, FromRank):
            return self._message(envelope)
        if isinstance(envelope, Region):
            for lent in self._lent:
                lent.settle()
        elif isinstance(envelope, Here) and envelope.rank in self.ranks:
            self.here.add(envelope.rank)
        elif isinstance(envelope, Gone) and envelope.rank in self.ranks:
            self._bury(envelope)
        else:
            raise Undecodable(f"{type(envelope).__name__} is not expected here.")
        return None

    def _message(self, envelope: FromRank) -> tuple[int, Message]:
        body, block = bytes(self._body), self._block
        self._body = self._block = b""
        try:
            message = messages.decode(body, block if envelope.block else None, [])
        except Undecodable as error:
            raise Undecodable(f"Rank {envelope.rank} sent an invalid answer. {error}") from None
        if isinstance(message, Ready):
            self.here.add(envelope.rank)
            self.ready[envelope.rank] = message.group
        elif isinstance(message, (Done, Failed)):
            self._unanswered.discard(envelope.rank)
            if not self._unanswered:
                self._job, self._lent = 0, []
        return envelope.rank, message

    # The payload's place

    def _place(self, envelope: Envelope) -> list[memoryview] | None:
        if self._leaves:
            return None
        if isinstance(envelope, FromRank):
            return self._place_message(envelope)
        if isinstance(envelope, Region):
            return self._place_region(envelope)
        raise Undecodable(f"{type(envelope).__name__} is not expected here.")

    def _place_message(self, envelope: FromRank) -> list[memoryview]:
        if envelope.rank not in self.ranks:
            raise Undecodable(f"It has no rank {envelope.rank}.")
        if not (0 < envelope.body <= MAX_BODY and 0 <= envelope.block <= MOST_TENSORS):
            raise Undecodable(f"No message has {envelope.body} bytes, and tensors of {envelope.block} bytes.")
        self._body = bytearray(envelope.body)
        self._block = _memory(envelope.block) if envelope.block else b""
        return [memoryview(self._body), memoryview(self._block)]

    def _place_region(self, region: Region) -> list[memoryview]:
        if region.job != self._job or not 0 <= region.lent < len(self._lent):
            raise Undecodable(f"It sends a part of the result {region.lent} of job {region.job}; job {self._job} runs.")
        return self._lent[region.lent].place(region)

    # The end

    def leave(self, reason: str) -> None:
        """Asks the machine to end its ranks. `farewell` waits until it has closed the connection."""
        with self._one_at_a_time:
            self._leaves = True
            if self._is_open:
                self._link.post(Leave(reason=reason))

    def farewell(self, deadline: float) -> None:
        """Waits, until `deadline` by time.monotonic, for the machine to close the connection; then closes it."""
        with self._one_at_a_time:
            try:
                while self._is_open and (seconds := deadline - time.monotonic()) > 0:
                    self._link.flush()
                    poll = select.poll()
                    poll.register(self.fileno(), select.POLLIN | (select.POLLOUT if self.unsent else 0))
                    poll.poll(0 if self.waiting else seconds * 1000)
                    self._envelope()
            except (ChannelClosed, Undecodable) as error:
                logger.debug("%s: %s", self.name, error)
            self.close()

    def close(self) -> None:
        with self._one_at_a_time:
            self._lose(f"The connection to the machine {self.name} was closed.")

    def _lose(self, text: str) -> None:
        self.loss = self.loss or text
        self._lent, self._body, self._block = [], b"", b""
        try:
            # A process that was forked meanwhile has a copy of the descriptor, which would keep the connection open.
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already
        self._link.close()

    def _bury(self, gone: Gone) -> None:
        """Of a rank that has ended. The connection stays, so that the machine can be asked to end the others."""
        which = f"Rank {gone.rank} of {self.hello.world_size}, on the machine {self.name},"
        if gone.by_kernel:
            self.loss = f"{which} was killed by SIGKILL, {host.BY_THE_KERNEL}."
        else:
            self.loss = f"{which} has ended. The output of torchrun on {self.name} says why."
        raise ChannelClosed(self.loss)

    def _lost(self, error: Exception) -> str:
        return f"The machine {self.name}, with {ranks_in_words(self.ranks)}, was lost: {str(error).rstrip('.')}."


def _memory(size: int) -> mmap.mmap:
    """The kernel gives pages only to what arrives, and at an address that suits every dtype."""
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        raise Undecodable(f"There is no memory for tensors of {size} bytes ({error.strerror}).") from None
