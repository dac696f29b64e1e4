"""The jobs of one call of a `Runtime` method."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..wire.messages import Free, Message
from ..wire.plans import Chosen
from .submission import Hooks, Result

logger = logging.getLogger(__name__)

MakeMessage = Callable[[int], Message]  # from the job's number


class JobsOfCall:
    """Submits jobs that share the hooks of one call. A cancel applies to all of them.

    submit: runs a job. start: starts the ranks if none are alive, or again if jobs shard weights by FSDP2 and these
    ranks cannot. on_devices: whether the ranks, once started, have memory of their own, and not only the host's.
    """

    def __init__(
        self,
        submit: Callable[[MakeMessage], Result],
        start: Callable[[bool], None],
        hooks: Hooks,
        on_devices: Callable[[], bool],
    ):
        self._submit, self._start, self._hooks, self._on_devices = submit, start, hooks, on_devices

    def __call__(self, make: MakeMessage) -> Result:
        return self._submit(make)

    @property
    def on_devices(self) -> bool:
        return self._on_devices()

    def begin(self, sharded: bool = False) -> None:
        """Starts the ranks if that is needed. sharded: whether jobs shard weights by FSDP2."""
        self._start(sharded)

    def free(self) -> None:
        """Frees the weights on all ranks."""
        self(lambda job: Free(job=job))

    def show(self, plan: Chosen) -> None:
        """Passes a job's plan to the caller, before the job."""
        logger.info("%s", plan.line)
        self._hooks.on_plan(plan)

    def notice(self, text: str) -> None:
        """Logs a warning, and passes it to the caller."""
        logger.warning("%s", text)
        self._hooks.on_notice(text)
