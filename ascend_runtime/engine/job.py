"""One job on a rank: timing, progress and cancellation."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..hardware import devices
from ..parallel.machines import machines
from ..parallel.mesh import all_reduce_max
from ..wire.channel import Channel
from ..wire.messages import Cancel, Message, Preview, Progress, SharedTensor, Wrote


class Cancelled(Exception):
    """The user cancelled the job."""


class PeerFailed(Exception):
    """Another rank failed, and reports the reason itself."""


class Job:
    """Services for the pipeline during a job: progress, previews, timing and cancellation."""

    def __init__(self, message: Message, channel: Channel, device: torch.device):
        self.message = message
        self.seconds: dict[str, float] = {}
        self._channel = channel
        self._device = device
        self._reports = dist.get_rank() == 0
        self._reports_parts = bool(machines().name_of(dist.get_rank()))  # to a client on another machine
        self._cancelled = False

    @contextmanager
    def stage(self, name: str):
        """Times a stage, with the device synchronised before and after."""
        devices.synchronise(self._device)
        start = time.perf_counter()
        yield
        devices.synchronise(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, stage: str, step: int, total: int) -> None:
        if self._reports:
            self._channel.send(Progress(job=self.message.job, stage=stage, step=step, total=total))

    def preview(self, step: int, total: int, image: torch.Tensor) -> None:
        """image: uint8 [H,W,3]."""
        if self._reports:
            self._channel.send(Preview(job=self.message.job, step=step, total=total, image=image))

    def wrote(self, memory: SharedTensor, part: Tensor) -> None:
        """Reports that this rank has written a part of the memory that the client lends for a result; for the relay,
        which sends it to a client on another machine. part: a view of the memory, with its dims in their order; it will
        not change any more."""
        if not self._reports_parts or not part.numel():
            return
        starts, offset = [], part.storage_offset()
        for dim in range(len(memory.shape)):
            start, offset = divmod(offset, math.prod(memory.shape[dim + 1 :]))
            starts.append(start)
        where = {"shape": memory.shape, "starts": tuple(starts), "sizes": tuple(part.shape)}
        # No message lends more than one memory.
        self._channel.send(Wrote(job=self.message.job, lent=0, itemsize=memory.dtype.itemsize, **where))

    def check(self) -> None:
        """Raises Cancelled if this rank has received a cancel. For work in which no other rank waits for this one."""
        if self._received_cancel():
            raise Cancelled

    def check_together(self, fault: bool = False) -> bool:
        """Raises Cancelled on all ranks if any has received a cancel, so that no rank waits in a collective. Returns
        whether any rank has seen a fault; one exchange decides both."""
        worst = all_reduce_max(2 if self._received_cancel() else int(fault))
        if worst == 2:
            raise Cancelled
        return bool(worst)

    @contextmanager
    def together(self):
        """Wraps work that ranks do independently before a collective: if it fails on one rank, all raise."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        worst = all_reduce_max(0 if error is None else 1 if isinstance(error, Cancelled) else 2)
        if error is not None and not isinstance(error, Cancelled):
            raise error
        if worst:
            raise Cancelled if worst == 1 else PeerFailed

    def _received_cancel(self) -> bool:
        while (message := self._channel.take()) is not None:
            if not isinstance(message, Cancel):
                raise RuntimeError(f"A {type(message).__name__} arrived during a job; clients send one job at a time.")
            self._cancelled |= message.job == self.message.job
        return self._cancelled
