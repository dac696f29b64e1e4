"""Shared memory between processes of one machine: for tensors of messages, and lent for results.

It uses anonymous memory files (memfd), which the kernel frees with the last process that holds them. They are reused
when all receivers have released them, as allocating new pages costs more than copying into them.
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

from ..errors import coded_error
from .messages import Parcel, SharedTensor

_LARGE = 1 << 20  # bytes; smaller blocks do not take the place of larger ones
_KEPT = 2  # blocks of either kind kept per process: the last one, and one that a receiver may still hold


@contextmanager
def lend(shape: tuple[int, ...], dtype: torch.dtype):
    """Allocates memory for a result and yields (tensor, shared): ranks write to `shared`, the caller keeps `tensor`.

    The pages live as long as the tensor or a view of it.
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
        raise coded_error(
            "AV-1208",
            f"A result of shape {list(shared.shape)} needs {shared.nbytes / 1e9:.0f} GB, which cannot be allocated "
            f"({error}). Make it smaller.",
        ) from None


def map_shared(shared: SharedTensor) -> Tensor:
    """Maps `shared` as a tensor; all processes that map it see each other's writes."""
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
    """A memory file for the tensors of one message at a time.

    Receivers get a second file description of it, locked with flock. The lock lives as long as any descriptor or
    mapping of that description in any process, so it shows whether all receivers have released the block.
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
        """A descriptor for receivers; the block is in use until all its copies and mappings are closed."""
        descriptor = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def write(self, offset: int, tensor: Tensor) -> None:
        if tensor.numel():
            place = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            place.view(tensor.shape).copy_(tensor.detach())


class _Blocks:
    """The reusable blocks of this process."""

    def __init__(self):
        self._large: deque[_Block] = deque(maxlen=_KEPT)
        self._small: deque[_Block] = deque(maxlen=_KEPT)
        self._one_at_a_time = threading.Lock()

    def fill(self, parcel: Parcel) -> int:
        """Copies the parcel's tensors into a block and returns a descriptor of it."""
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

    def forget(self) -> None:
        """Frees the blocks; those that a receiver holds are freed with it."""
        with self._one_at_a_time:
            self._large.clear()
            self._small.clear()

    def _find(self, size: int) -> _Block:
        kept = self._large if size >= _LARGE else self._small
        for block in kept:
            if block.size == size and block.is_free():
                return block
        block = _Block(size)
        kept.append(block)
        return block


blocks = _Blocks()
