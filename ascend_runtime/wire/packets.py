"""Sends messages between processes of one machine, over a stream socket and shared memory.

A message's tensors are copied once into shared memory (shared_memory.py). The socket passes its descriptor to every
receiver (SCM_RIGHTS).
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import stat
import struct
import time
from array import array
from collections import deque

from . import messages, shared_memory
from .messages import Message, Undecodable

_HEADER = struct.Struct("<4sIQI")  # magic, bytes of the body, bytes of the tensor block, number of descriptors
_MAGIC = b"ASC1"  # the first bytes of each message, to detect a stream that is out of sync
_MAX_BODY = 1 << 26  # bytes; a long prompt and a long traceback are 100 times smaller
_MAX_DESCRIPTORS = 8
_PIECE = 1 << 20  # bytes per read


class ChannelClosed(EOFError):
    """The other side has disconnected, or its stream is out of sync."""


class SealedMessage:
    """An encoded message that can be sent several times; its tensors are in one memory file. A context manager.

    Raises ValueError if the message cannot be sent.
    """

    def __init__(self, message: Message):
        parcel = messages.encode(message)
        if len(parcel.body) > _MAX_BODY:
            raise ValueError(
                f"{type(message).__name__} has {len(parcel.body)} bytes without its tensors; at most {_MAX_BODY} can "
                "be sent. Shorten the long text or list in it."
            )
        self._own = shared_memory.blocks.fill(parcel) if parcel.size else None
        self.descriptors = ([self._own] if self._own is not None else []) + list(parcel.shared)
        self.data = _HEADER.pack(_MAGIC, len(parcel.body), parcel.size, len(self.descriptors)) + parcel.body

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
        sock.setblocking(False)
        self._socket = sock
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._received = bytearray()  # of a message that is not complete yet
        self._descriptors: list[int] = []  # received with it

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether posted data is still waiting to be sent."""
        return bool(self._unsent)

    def post(self, sealed: SealedMessage) -> None:
        """Sends as much as possible without blocking; `flush` sends the rest, and `sealed` must stay open until then.

        Raises ChannelClosed if the other side has disconnected.
        """
        self._unsent.append((memoryview(sealed.data), sealed.descriptors))
        self.flush()

    def flush(self) -> None:
        """Sends posted data as far as possible without blocking. Raises ChannelClosed."""
        try:
            while self._unsent:
                data, descriptors = self._unsent[0]
                sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
                self._unsent[0] = data[sent:], []  # descriptors go with the first byte
                if sent == len(data):
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the other side of the control connection is gone") from error

    def take(self) -> Message | None:
        """The next message, or None if it has not arrived completely. Raises ChannelClosed at the end of file, and
        Undecodable for an invalid message, after which the next one can still be read."""
        if not self._fill(_HEADER.size):
            return None
        magic, body_size, block_size, count = _HEADER.unpack_from(self._received)
        if magic != _MAGIC or body_size > _MAX_BODY:
            raise ChannelClosed("the other side of the control connection sent an invalid header")
        if not self._fill(_HEADER.size + body_size):
            return None
        body, descriptors = bytes(memoryview(self._received)[_HEADER.size :]), self._descriptors
        self._received, self._descriptors = bytearray(), []
        return _assembled(body, block_size, count, descriptors)

    def send(self, message: Message, timeout: float | None = None) -> None:
        """Sends one message. Raises ChannelClosed, TimeoutError, and ValueError if the message cannot be sent."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with SealedMessage(message) as sealed:
            self.post(sealed)
            while self._unsent:
                self._wait(select.POLLOUT, deadline)
                self.flush()

    def receive(self, timeout: float | None = None) -> Message:
        """Waits for the next message. Raises as `take` does, and TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self.take()) is None:
            self._wait(select.POLLIN, deadline)
        return message

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether data or an end of file arrives within `timeout` seconds."""
        return self._ready(select.POLLIN, timeout)

    def close(self) -> None:
        _close_all(self._descriptors)
        self._socket.close()

    def _wait(self, event: int, deadline: float | None) -> None:
        timeout = None if deadline is None else deadline - time.monotonic()
        if (timeout is not None and timeout <= 0) or not self._ready(event, timeout):
            raise TimeoutError("the other side of the control connection did not answer in time")

    def _ready(self, event: int, timeout: float | None) -> bool:
        poll = select.poll()  # unlike select(), it supports descriptors above 1023
        poll.register(self._socket, event)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _fill(self, size: int) -> bool:
        """Reads the message up to `size` bytes, without blocking. Returns whether all of them have arrived."""
        try:
            while (missing := size - len(self._received)) > 0:
                room = 0 if self._received else _CONTROL  # descriptors come with the first byte
                data, control, _, _ = self._socket.recvmsg(min(missing, _PIECE), room, socket.MSG_CMSG_CLOEXEC)
                self._descriptors += _descriptors_in(control)
                if not data:
                    raise ChannelClosed("the other side of the control connection is gone")
                self._received += data
        except BlockingIOError:
            return False
        except ConnectionResetError as error:
            raise ChannelClosed("the other side of the control connection is gone") from error
        return True


_CONTROL = socket.CMSG_LEN(_MAX_DESCRIPTORS * struct.calcsize("i"))


def _descriptors_in(control: list[tuple[int, int, bytes]]) -> list[int]:
    """The received descriptors. The kernel closes those that it cannot deliver."""
    found = array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _assembled(body: bytes, block_size: int, count: int, descriptors: list[int]) -> Message:
    """The decoded message. It owns the descriptors that it refers to; all others are closed, also after an error."""
    try:
        if len(descriptors) != count:
            raise Undecodable(f"The header announces {count} descriptors, but {len(descriptors)} arrived.")
        block = _mapped(descriptors.pop(0), block_size) if block_size and descriptors else None
    except BaseException:
        _close_all(descriptors)
        raise
    return messages.decode(body, block, descriptors)


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """Maps the memory file of a message, copy-on-write, and closes its descriptor."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < size:
            raise Undecodable(f"The header announces {size} bytes of tensors, but {status.st_size} arrived.")
        return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:
        raise Undecodable(f"The memory file of {size} bytes of tensors cannot be mapped ({error}).") from None
    finally:
        os.close(descriptor)


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket of its other end for a rank to inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs
