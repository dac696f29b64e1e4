"""Moves messages between processes of one machine: a stream socket, and memory passed along it.

A message's tensors are copied once into an anonymous memory file (memfd), whose descriptor goes to every
receiver (SCM_RIGHTS). Such memory has no name: it is gone with the last process that holds it, however that ends.
Large ones are used again once every receiver has let go, as new pages cost more than the copy into them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import weakref
from collections import deque
from contextlib import contextmanager

import torch
from torch import Tensor

from . import protocol
from .protocol import Message, SharedTensor

_HEADER = struct.Struct("<IQI")  # bytes of the body, bytes of the tensor block, descriptors
_MAX_DESCRIPTORS = 8
_LARGE = 1 << 20  # bytes from which a block is kept for the next message of its size
_KEPT = 2  # large blocks kept by a process: what it sent last, and what a receiver may hold on to meanwhile


class ChannelClosed(EOFError):
    """The other side is gone."""


class SealedMessage:
    """A message ready to be sent any number of times: its tensors lie in one memory file. A context manager."""

    def __init__(self, message: Message):
        parcel = protocol.encode(message)
        self._own = _blocks.fill(parcel) if parcel.size else None
        descriptors = ([self._own] if self._own is not None else []) + list(parcel.shared)
        self._data = _HEADER.pack(len(parcel.body), parcel.size, len(descriptors)) + parcel.body
        self._descriptors = descriptors

    def send_over(self, sock: socket.socket) -> None:
        data, descriptors = memoryview(self._data), self._descriptors
        sent = socket.send_fds(sock, [data], descriptors) if descriptors else sock.send(data)
        if sent < len(data):
            sock.sendall(data[sent:])

    def __enter__(self) -> SealedMessage:
        return self

    def __exit__(self, *_):
        if self._own is not None:
            os.close(self._own)
            self._own = None


class Channel:
    """One end of the control connection of a rank."""

    def __init__(self, sock: socket.socket):
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends one message. Raises ChannelClosed where the other side is gone."""
        with SealedMessage(message) as sealed:
            self.send_sealed(sealed)

    def send_sealed(self, sealed: SealedMessage) -> None:
        try:
            sealed.send_over(self._socket)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the other side of the control connection is gone") from error

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether `receive` would find something, an end of file too, within `timeout` seconds."""
        poll = select.poll()  # unlike select(), it takes descriptors above 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def receive(self) -> Message:
        """Waits for the next message. Raises ChannelClosed at the end of file."""
        header, descriptors = self._receive_header()
        body_size, block_size, count = _HEADER.unpack(header)
        if len(descriptors) != count:
            raise ChannelClosed(f"{count} descriptors were announced and {len(descriptors)} came")
        body = self._receive_exactly(body_size)
        block = None
        if block_size:
            own = descriptors.pop(0)
            block = mmap.mmap(own, block_size, flags=mmap.MAP_PRIVATE)
            os.close(own)
        return protocol.decode(body, block, descriptors)

    def close(self) -> None:
        self._socket.close()

    def _receive_header(self) -> tuple[bytes, list[int]]:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, _MAX_DESCRIPTORS)
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            raise ChannelClosed("the other side of the control connection is gone")
        return data + self._receive_exactly(_HEADER.size - len(data)), descriptors

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:  # once, unless a signal comes between
            more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                raise ChannelClosed("the control connection ended inside a message")
            data += more
        return data


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket of its other end, to be inherited by a rank."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs


@contextmanager
def lend(shape: tuple[int, ...], dtype: torch.dtype):
    """Memory for a result: yields (tensor, shared); others write to `shared`, the caller keeps `tensor`.

    The tensor holds the pages for as long as it or a view of it lives.
    """
    shared = SharedTensor(os.memfd_create("ascend-frames"), dtype, tuple(shape))
    try:
        os.ftruncate(shared.fd, shared.nbytes)
        yield map_shared(shared), shared
    finally:
        os.close(shared.fd)


def map_shared(shared: SharedTensor) -> Tensor:
    """The tensor that lies in `shared`; writes are seen by every process that maps it."""
    memory = mmap.mmap(shared.fd, shared.nbytes)
    return torch.frombuffer(memory, dtype=shared.dtype).view(shared.shape)


@contextmanager
def borrowed(shared: SharedTensor):
    """Maps lent memory and closes the descriptor; the mapping ends with the last view of the tensor."""
    try:
        yield map_shared(shared)
    finally:
        os.close(shared.fd)


class _Block:
    """Memory that carries the tensors of one message at a time.

    Receivers get a second opening of its file, which is locked (flock). Such a lock lives as long as any descriptor
    or mapping of that opening, in whatever process: so the kernel knows when the last receiver has let go.
    """

    def __init__(self, size: int):
        self.size = size
        self._fd = os.memfd_create("ascend-message")
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, size)
        self._memory = mmap.mmap(self._fd, size)

    def is_free(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def open(self) -> int:
        """A descriptor for receivers; the block is not free before all of its copies and mappings are gone."""
        descriptor = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def write(self, offset: int, tensor: Tensor) -> None:
        if tensor.numel():
            place = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            place.view(tensor.shape).copy_(tensor.detach())


class _Blocks:
    """The blocks of this process."""

    def __init__(self):
        self._kept: deque[_Block] = deque(maxlen=_KEPT)
        self._one_at_a_time = threading.Lock()

    def fill(self, parcel: protocol.Parcel) -> int:
        """The descriptor of a block that holds the parcel's tensors."""
        with self._one_at_a_time:
            block = self._find(parcel.size)
            descriptor = block.open()
        for offset, tensor in parcel.tensors:
            block.write(offset, tensor)
        return descriptor

    def _find(self, size: int) -> _Block:
        for block in self._kept:
            if block.size == size and block.is_free():
                return block
        block = _Block(size)
        if size >= _LARGE:
            self._kept.append(block)
        return block


_blocks = _Blocks()
