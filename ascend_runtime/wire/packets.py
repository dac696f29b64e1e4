"""Sends bytes and descriptors between processes of one machine, over a stream socket. Does not import torch.

A packet is the encoded form of a message: its body, and the descriptors of the memory files with its tensors, which the
socket passes to the receiver (SCM_RIGHTS).
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

_HEADER = struct.Struct("<4sIQI")  # magic, bytes of the body, bytes of the tensor block, number of descriptors
_MAGIC = b"ASC1"  # the first bytes of each message, to detect a stream that is out of sync
MAX_BODY = 1 << 26  # bytes; a long prompt and a long traceback are 100 times smaller
_MAX_DESCRIPTORS = 8
_PIECE = 1 << 20  # bytes per read


class ChannelClosed(EOFError):
    """The other side has disconnected, or its stream is out of sync."""


class Undecodable(ValueError):
    """Received data is not a valid message, or refers to a tensor that did not arrive."""


def header(body: bytes, block_size: int, count: int) -> bytes:
    """What goes in front of a packet's body. block_size: bytes of tensors in the first of `count` descriptors, or 0."""
    return _HEADER.pack(_MAGIC, len(body), block_size, count)


class Packet:
    """A received packet, which owns its descriptors. block_size: bytes of tensors in the first of them, or 0."""

    def __init__(self, body: bytes, block_size: int, descriptors: list[int]):
        self.body = body
        self.block_size = block_size
        self.descriptors = descriptors

    def map_block(self) -> mmap.mmap | None:
        """Maps the tensors' memory, copy-on-write, and closes its descriptor; None if the packet has no tensors.

        Raises Undecodable, after which the packet is closed.
        """
        if not self.block_size or not self.descriptors:
            return None
        try:
            return _mapped(self.descriptors.pop(0), self.block_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the descriptors."""
        _close_all(self.descriptors)


class Packets:
    """One end of the connection. `post`, `flush` and `take` never block."""

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

    def post(self, data: bytes, descriptors: list[int]) -> None:
        """Sends as much as possible without blocking; `flush` sends the rest, and the descriptors must stay open until
        then. data: a header and a body.

        Raises ChannelClosed if the other side has disconnected.
        """
        self._unsent.append((memoryview(data), descriptors))
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

    def take(self) -> Packet | None:
        """The next packet, or None if it has not arrived completely. Raises ChannelClosed at the end of file, and
        Undecodable for an invalid packet, after which the next one can still be read."""
        if not self._fill(_HEADER.size):
            return None
        magic, body_size, block_size, count = _HEADER.unpack_from(self._received)
        if magic != _MAGIC or body_size > MAX_BODY:
            raise ChannelClosed("the other side of the control connection sent an invalid header")
        if not self._fill(_HEADER.size + body_size):
            return None
        packet = Packet(bytes(memoryview(self._received)[_HEADER.size :]), block_size, self._descriptors)
        self._received, self._descriptors = bytearray(), []
        if len(packet.descriptors) != count:
            arrived = len(packet.descriptors)
            packet.close()
            raise Undecodable(f"The header announces {count} descriptors, but {arrived} arrived.")
        return packet

    def wait(self, event: int, deadline: float | None) -> None:
        """Waits for an event of select.poll, until `deadline` by time.monotonic. Raises TimeoutError."""
        timeout = None if deadline is None else deadline - time.monotonic()
        if (timeout is not None and timeout <= 0) or not self._ready(event, timeout):
            raise TimeoutError("the other side of the control connection did not answer in time")

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether data or an end of file arrives within `timeout` seconds."""
        return self._ready(select.POLLIN, timeout)

    def close(self) -> None:
        _close_all(self._descriptors)
        self._socket.close()

    def _ready(self, event: int, timeout: float | None) -> bool:
        poll = select.poll()  # unlike select(), it supports descriptors above 1023
        poll.register(self._socket, event)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _fill(self, size: int) -> bool:
        """Reads the packet up to `size` bytes, without blocking. Returns whether all of them have arrived."""
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
