"""Moves messages between processes of one machine: a stream socket, and memory passed along it.

A message's tensors are copied once into shared memory (shared_memory.py), whose descriptor goes to every receiver
(SCM_RIGHTS).
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

_HEADER = struct.Struct("<4sIQI")  # mark, bytes of the body, bytes of the tensor block, descriptors
_MARK = b"ASC1"  # begins each message: what does not begin so is out of step
_MOST_BODY = 1 << 26  # bytes; a long prompt and a long traceback are 100 times smaller
_MOST_DESCRIPTORS = 8
_PIECE = 1 << 20  # bytes read at once


class ChannelClosed(EOFError):
    """The other side is gone, or out of step."""


class SealedMessage:
    """A message ready to be sent any number of times: its tensors lie in one memory file. A context manager.

    Raises ValueError for what cannot be sent.
    """

    def __init__(self, message: Message):
        parcel = messages.encode(message)
        if len(parcel.body) > _MOST_BODY:
            raise ValueError(
                f"{type(message).__name__} takes {len(parcel.body)} bytes without its tensors; at most {_MOST_BODY} "
                "are sent. A text or a list in it is too long."
            )
        self._own = shared_memory.blocks.fill(parcel) if parcel.size else None
        self.descriptors = ([self._own] if self._own is not None else []) + list(parcel.shared)
        self.data = _HEADER.pack(_MARK, len(parcel.body), parcel.size, len(self.descriptors)) + parcel.body

    def __enter__(self) -> SealedMessage:
        return self

    def __exit__(self, *_):
        if self._own is not None:
            os.close(self._own)
            self._own = None


class Channel:
    """One end of the control connection of a rank.

    `post`, `flush` and `take` never wait, so that who has several channels waits for none of them in particular; `send`
    and `receive` wait for as long as the other side lives, or for as many seconds as they are given.
    """

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self._socket = sock
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._arrived = bytearray()  # of the message that is on its way
        self._descriptors: list[int] = []  # that came with it

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether something posted is still here."""
        return bool(self._unsent)

    def post(self, sealed: SealedMessage) -> None:
        """Sends as much as the connection takes now; the rest is sent by `flush`, until when `sealed` stays open.

        Raises ChannelClosed where the other side is gone.
        """
        self._unsent.append((memoryview(sealed.data), sealed.descriptors))
        self.flush()

    def flush(self) -> None:
        """Sends what was posted, as far as the connection takes it now. Raises ChannelClosed."""
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
        """The next message, if it is here whole. Raises ChannelClosed at the end of file, and Undecodable for what is
        no message; the next one can still be read then."""
        if not self._fill(_HEADER.size):
            return None
        mark, body_size, block_size, count = _HEADER.unpack_from(self._arrived)
        if mark != _MARK or body_size > _MOST_BODY:
            raise ChannelClosed("the other side of the control connection sent what is no message")
        if not self._fill(_HEADER.size + body_size):
            return None
        body, descriptors = bytes(memoryview(self._arrived)[_HEADER.size :]), self._descriptors
        self._arrived, self._descriptors = bytearray(), []
        return _assembled(body, block_size, count, descriptors)

    def send(self, message: Message, timeout: float | None = None) -> None:
        """Sends one message. Raises ChannelClosed, TimeoutError, and ValueError for what cannot be sent."""
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
        """Whether something has come, be it an end of file or a part of a message, within `timeout` seconds."""
        return self._ready(select.POLLIN, timeout)

    def close(self) -> None:
        _close_all(self._descriptors)
        self._socket.close()

    def _wait(self, event: int, deadline: float | None) -> None:
        timeout = None if deadline is None else deadline - time.monotonic()
        if (timeout is not None and timeout <= 0) or not self._ready(event, timeout):
            raise TimeoutError("the other side of the control connection did not answer in time")

    def _ready(self, event: int, timeout: float | None) -> bool:
        poll = select.poll()  # unlike select(), it takes descriptors above 1023
        poll.register(self._socket, event)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _fill(self, size: int) -> bool:
        """Whether so many bytes of the message are here; takes what has come of them, and not a byte more."""
        try:
            while (missing := size - len(self._arrived)) > 0:
                room = 0 if self._arrived else _CONTROL  # descriptors come with the first byte; the kernel drops others
                data, control, _, _ = self._socket.recvmsg(min(missing, _PIECE), room, socket.MSG_CMSG_CLOEXEC)
                self._descriptors += _descriptors_in(control)
                if not data:
                    raise ChannelClosed("the other side of the control connection is gone")
                self._arrived += data
        except BlockingIOError:
            return False
        except ConnectionResetError as error:
            raise ChannelClosed("the other side of the control connection is gone") from error
        return True


_CONTROL = socket.CMSG_LEN(_MOST_DESCRIPTORS * struct.calcsize("i"))


def _descriptors_in(control: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came along: those that the kernel could not deliver are closed by it."""
    found = array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _assembled(body: bytes, block_size: int, count: int, descriptors: list[int]) -> Message:
    """The message, which owns the descriptors that it names; the others are closed, whatever is wrong."""
    try:
        if len(descriptors) != count:
            raise Undecodable(f"{count} descriptors were announced, and {len(descriptors)} came.")
        block = _mapped(descriptors.pop(0), block_size) if block_size and descriptors else None
    except BaseException:
        _close_all(descriptors)
        raise
    return messages.decode(body, block, descriptors)


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """The memory file of a message, for this process to read and change. Closes the descriptor."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < size:
            raise Undecodable(f"{size} bytes of tensors were announced, and {status.st_size} came.")
        return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:
        raise Undecodable(f"The memory of {size} bytes that came along cannot be read ({error}).") from None
    finally:
        os.close(descriptor)


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket of its other end, to be inherited by a rank."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs
