"""Counts what this process and its ranks fill in shared memory for each other."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

from ascend_runtime.wire import packets, shared_memory


class SharedBytes:
    """Counts the bytes of tensors that this process sends to its ranks, and of what it gets from them, inside its
    `with` block."""

    def __init__(self):
        self.sent = self.received = 0
        self._patches = ExitStack()

    def __enter__(self) -> SharedBytes:
        fill, mapped = shared_memory.block_of, packets._mapped

        def filled(parcel):
            self.sent += sum(tensor.nbytes for _, tensor in parcel.tensors)
            return fill(parcel)

        def received(descriptor, size):
            self.received += size
            return mapped(descriptor, size)

        self._patches.enter_context(patch.object(shared_memory, "block_of", filled))
        self._patches.enter_context(patch.object(packets, "_mapped", received))
        return self

    def __exit__(self, *_) -> None:
        self._patches.close()

    def taken(self) -> tuple[int, int]:
        """The bytes (sent, received) since the last time."""
        taken, self.sent, self.received = (self.sent, self.received), 0, 0
        return taken
