"""Memory files for the tensors of messages, shared between processes of one machine. Does not import torch.

They are anonymous (memfd): the kernel frees them with the last process that holds them. They are reused when all
receivers have released them, as allocating new pages costs more than copying into them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import weakref
from collections import deque
from typing import NamedTuple

_LARGE = 1 << 20  # bytes; smaller blocks do not take the place of larger ones
_KEPT = 2  # blocks of either kind kept per process: the last one, and one that a receiver may still hold


class Block(NamedTuple):
    """Memory for the tensors of one message. memory: to be filled, writable.

    descriptor: for receivers, read-only; the caller owns it. The block is in use until all copies of the descriptor,
    and all mappings of it, in all processes are closed.
    """

    memory: mmap.mmap
    descriptor: int


class _File:
    """A memory file for the tensors of one message at a time.

    Receivers get a second file description of it, locked with flock. The lock lives as long as any descriptor or
    mapping of that description in any process, so it shows whether all receivers have released the block.
    """

    def __init__(self, size: int):
        self.size = size
        self._fd = os.memfd_create("ascend-message")
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, size)
        self.memory = mmap.mmap(self._fd, size)

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


class _Blocks:
    """The reusable blocks of this process."""

    def __init__(self):
        self._large: deque[_File] = deque(maxlen=_KEPT)
        self._small: deque[_File] = deque(maxlen=_KEPT)
        self._one_at_a_time = threading.Lock()

    def of(self, size: int) -> Block:
        """A block of `size` bytes, at least 1, that nobody else uses. Raises OSError if it cannot be allocated."""
        with self._one_at_a_time:
            file = self._find(size)
            return Block(file.memory, file.open())

    def forget(self) -> None:
        """Frees the blocks; those that a receiver holds are freed with it."""
        with self._one_at_a_time:
            self._large.clear()
            self._small.clear()

    def _find(self, size: int) -> _File:
        kept = self._large if size >= _LARGE else self._small
        for file in kept:
            if file.size == size and file.is_free():
                return file
        file = _File(size)
        kept.append(file)
        return file


blocks = _Blocks()
