"""Memory that processes of one machine share: the tensors of messages, and memory that is lent for a result.

It lies in anonymous memory files (memfd), which have no name: such a file is gone with the last process that holds it,
however that ends. Large ones are used again once every receiver has let go, as new pages cost more than the copy into
them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import weakref
from collections import deque
from contextlib import contextmanager

import torch
from torch import Tensor

from .messages import Parcel, SharedTensor

_LARGE = 1 << 20  # bytes from which a block is kept for the next message of its size
_KEPT = 2  # large blocks kept by a process: what it sent last, and what a receiver may hold on to meanwhile


@contextmanager
def lend(shape: tuple[int, ...], dtype: torch.dtype):
    """Memory for a result: yields (tensor, shared); others write to `shared`, the caller keeps `tensor`.

    The tensor holds the pages for as long as it or a view of it lives.
    """
    shared = SharedTensor(os.memfd_create("ascend-frames"), dtype, tuple(shape))
    try:
        yield _sized(shared), shared
    finally:
        shared.close()


def _sized(shared: SharedTensor) -> Tensor:
    try:
        os.ftruncate(shared.fd, shared.nbytes)
        return map_shared(shared)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"A result {list(shared.shape)} takes {shared.nbytes / 1e9:.0f} GB, which cannot be had here ({error}). "
            "Make it smaller."
        ) from None


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
        shared.close()


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

    def fill(self, parcel: Parcel) -> int:
        """The descriptor of a block that holds the parcel's tensors."""
        with self._one_at_a_time:
            block = self._find(parcel.size)
            descriptor = block.open()
        try:
            for offset, tensor in parcel.tensors:
                block.write(offset, tensor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _find(self, size: int) -> _Block:
        for block in self._kept:
            if block.size == size and block.is_free():
                return block
        block = _Block(size)
        if size >= _LARGE:
            self._kept.append(block)
        return block


blocks = _Blocks()
