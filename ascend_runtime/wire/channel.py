"""Sends messages between processes of one machine, over a stream socket and shared memory.

A message's tensors are copied once into shared memory (shared_memory.py). The socket passes its descriptor to every
receiver (packets.py).
"""

from __future__ import annotations

import os
import select
import socket
import time

from . import messages, shared_memory
from .messages import Message, SharedTensor
from .packets import MAX_BODY, Packet, Packets, header
from .packets import ChannelClosed as ChannelClosed  # for those who use a channel


class SealedMessage:
    """An encoded message that can be sent several times; its tensors are in one memory file. A context manager.

    body: without its tensors. block: its tensors, as the memory file has them; empty without tensors. lent: the memory
    that it lends. Raises ValueError if the message cannot be sent.
    """

    def __init__(self, message: Message):
        parcel = messages.encode(message)
        if len(parcel.body) > MAX_BODY:
            raise ValueError(
                f"{type(message).__name__} has {len(parcel.body)} bytes without its tensors; at most {MAX_BODY} can "
                "be sent. Shorten the long text or list in it."
            )
        self.body = parcel.body
        self.lent: tuple[SharedTensor, ...] = parcel.shared
        self.block, self._own = shared_memory.block_of(parcel) if parcel.size else (memoryview(b""), None)
        self.descriptors = ([self._own] if self._own is not None else []) + [lent.fd for lent in parcel.shared]
        self.data = header(parcel.body, parcel.size, len(self.descriptors)) + parcel.body

    def __enter__(self) -> SealedMessage:
        return self

    def __exit__(self, *_):
        if self._own is not None:
            os.close(self._own)
            self._own = None


class Channel:
    """One end of the control connection of a rank.

    `post`, `flush` and `take` never block, so a client can serve several channels. `send` and `receive` block as long
    as the other side is connected, or for `timeout` seconds.
    """

    def __init__(self, sock: socket.socket):
        self._packets = Packets(sock)

    def fileno(self) -> int:
        return self._packets.fileno()

    @property
    def unsent(self) -> bool:
        """Whether posted data is still waiting to be sent."""
        return self._packets.unsent

    def post(self, sealed: SealedMessage) -> None:
        """Sends as much as possible without blocking; `flush` sends the rest, and `sealed` must stay open until then.

        Raises ChannelClosed if the other side has disconnected.
        """
        self._packets.post(sealed.data, sealed.descriptors)

    def flush(self) -> None:
        """Sends posted data as far as possible without blocking. Raises ChannelClosed."""
        self._packets.flush()

    def take(self) -> Message | None:
        """The next message, or None if it has not arrived completely. Raises ChannelClosed at the end of file, and
        Undecodable for an invalid message, after which the next one can still be read."""
        packet = self._packets.take()
        return None if packet is None else _decoded(packet)

    def send(self, message: Message, timeout: float | None = None) -> None:
        """Sends one message. Raises ChannelClosed, TimeoutError, and ValueError if the message cannot be sent."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with SealedMessage(message) as sealed:
            self.post(sealed)
            while self.unsent:
                self._packets.wait(select.POLLOUT, deadline)
                self.flush()

    def receive(self, timeout: float | None = None) -> Message:
        """Waits for the next message. Raises as `take` does, and TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self.take()) is None:
            self._packets.wait(select.POLLIN, deadline)
        return message

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether data or an end of file arrives within `timeout` seconds."""
        return self._packets.poll(timeout)

    def close(self) -> None:
        self._packets.close()


def _decoded(packet: Packet) -> Message:
    """The message, which owns the descriptors that it refers to; all others are closed, also after an error."""
    block = packet.map_block()
    return messages.decode(packet.body, block, packet.descriptors)


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket of its other end for a rank to inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs
