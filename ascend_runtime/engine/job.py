"""The life of one job on a rank: its clock, its progress, and whether it goes on."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..hardware import devices
from ..parallel.mesh import highest
from ..wire.channel import Channel
from ..wire.messages import Cancel, Message, Preview, Progress


class Cancelled(Exception):
    """The user asked for the end of the job."""


class PeerFailed(Exception):
    """Another rank cannot go on, and says why itself."""


class Job:
    """What the pipeline may ask for while it works on a job: progress, previews, the clock, and whether to go on."""

    def __init__(self, message: Message, channel: Channel, device: torch.device):
        self.message = message
        self.seconds: dict[str, float] = {}
        self._channel = channel
        self._device = device
        self._speaks = dist.get_rank() == 0
        self._cancelled = False

    @contextmanager
    def stage(self, name: str):
        """Times a stage from a still device to a still device."""
        devices.synchronise(self._device)
        start = time.perf_counter()
        yield
        devices.synchronise(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, stage: str, step: int, total: int) -> None:
        if self._speaks:
            self._channel.send(Progress(job=self.message.job, stage=stage, step=step, total=total))

    def preview(self, step: int, total: int, image: torch.Tensor) -> None:
        """image: uint8 [H,W,3]."""
        if self._speaks:
            self._channel.send(Preview(job=self.message.job, step=step, total=total, image=image))

    def check(self) -> None:
        """Raises Cancelled if this rank has heard so. For work in which no other rank waits for this one."""
        if self._heard_cancel():
            raise Cancelled

    def check_together(self) -> None:
        """Raises Cancelled on all ranks alike, if any has heard so: no rank is left inside an exchange."""
        if highest(self._heard_cancel()):
            raise Cancelled

    @contextmanager
    def together(self):
        """Around work that each rank does for itself before all exchange: if it fails on one, none goes on."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        worst = highest(0 if error is None else 1 if isinstance(error, Cancelled) else 2)
        if error is not None and not isinstance(error, Cancelled):
            raise error
        if worst:
            raise Cancelled if worst == 1 else PeerFailed

    def _heard_cancel(self) -> bool:
        while (message := self._channel.take()) is not None:
            if not isinstance(message, Cancel):
                raise RuntimeError(f"A {type(message).__name__} came during a job; a client sends one at a time.")
            self._cancelled |= message.job == self.message.job
        return self._cancelled
