"""A message on its way from the client to ranks: the memory that it is received in, and lent memory in place of the
client's."""

from __future__ import annotations

import mmap
import os

from ....wire.envelopes import Deliver
from ....wire.memory import Block, blocks
from .ranks import Delivery


class LentMemory:
    """This machine's memory for a result. descriptor: for the ranks; whoever makes this owns it."""

    def __init__(self, size: int):
        self.descriptor = os.memfd_create("ascend-frames")
        try:
            os.ftruncate(self.descriptor, size)
            self.view = memoryview(mmap.mmap(self.descriptor, size)) if size else memoryview(b"")
        except BaseException:
            os.close(self.descriptor)
            raise


class Arriving:
    """A message that is being received. places: for its payload. Raises OSError if there is not enough memory."""

    def __init__(self, envelope: Deliver):
        self._descriptors: list[int] = []
        self._body = bytearray(envelope.body)
        self._block = envelope.block
        self.places = [memoryview(self._body)]
        self.lent: list[LentMemory] = []
        if envelope.block:
            block: Block = blocks.of(envelope.block)
            self._descriptors.append(block.descriptor)
            self.places.append(memoryview(block.memory)[: envelope.block])
        for size in envelope.lent:
            self.lent.append(LentMemory(size))
            self._descriptors.append(self.lent[-1].descriptor)

    def delivery(self) -> Delivery:
        """The message, once it has arrived."""
        descriptors, self._descriptors = self._descriptors, []
        return Delivery(bytes(self._body), self._block, descriptors)

    def __del__(self):
        while self._descriptors:
            os.close(self._descriptors.pop())
