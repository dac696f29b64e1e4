"""The ranks that a `Runtime` keeps: started, stopped and freed, with one job at a time."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..hardware import devices
from ..specs import Cluster, ParallelSpec
from ..wire.messages import Free, Message, Velocity
from . import submission
from .arguments import check_for_cluster, check_kind
from .choosing import Choices
from .group import RankDied, RankGroup
from .jobs import JobsOfCall, MakeMessage
from .machines.group import ClusterGroup
from .machines.meeting import Meeting
from .model_calls import HeldByRanks
from .submission import Hooks, JobCancelled, RankError, RanksSilent, Result, Submission

logger = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound="KeptRanks")


class KeptRanks:
    """Ranks that start with the first job and stay. See `runtime.Runtime`, which has the jobs."""

    def __init__(
        self,
        parallel: ParallelSpec = ParallelSpec(),
        device: str = "auto",
        environment: dict[str, str] | None = None,
        cluster: Cluster | None = None,
    ):
        check_kind("parallel", parallel, ParallelSpec)
        check_kind("environment", environment, dict, optional=True)
        check_kind("cluster", cluster, Cluster, optional=True)
        for name, value in (environment or {}).items():
            check_kind("a name in environment", name, str)
            check_kind(f"environment[{name!r}]", value, str)
        self.parallel = parallel
        self._environment, self._asked_device = environment, device
        self._meeting = None if cluster is None else Meeting(cluster)
        if cluster is None:
            self.device = devices.resolve_kind(device)
            self.world_size = devices.resolve_ranks(parallel.ranks, self.device, {**os.environ, **(environment or {})})
        else:
            check_for_cluster(parallel, device, environment, cluster)
            self.device, self.world_size = device, cluster.ranks
        self._group: RankGroup | ClusterGroup | None = None
        self._finalizer: weakref.finalize | None = None  # ends the group with this object
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._one_job = threading.Lock()
        self._owner: int | None = None  # the thread that holds _one_job
        self._running = False  # whether it runs a job
        self._cancel_requested = threading.Event()
        self._one_stop = threading.Lock()
        self._stop_wanted = threading.Event()  # waiting jobs must not begin
        self._free_wanted = False
        self._held = HeldByRanks()  # these two are used by the holder of _one_job only
        self._choices = Choices()
        self._logged: deque[str] = deque(maxlen=100)  # warnings of jobs that are in the log already

    def __enter__(self: Kept) -> Kept:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # Life

    @property
    def alive(self) -> bool:
        """Whether a group of ranks is ready for jobs."""
        return self._living is not None

    @property
    def _living(self) -> RankGroup | ClusterGroup | None:
        group = self._group
        return group if self._is_own and group is not None and group.alive else None

    @property
    def _is_own(self) -> bool:
        """False in a forked child, as the ranks belong to its parent."""
        return os.getpid() == self._pid

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks, in order; empty if none are alive, and for those of a cluster."""
        group = self._living
        return [] if group is None else group.pids

    @property
    def machines(self) -> list[str]:
        """The names of the cluster's machines that are connected, in the order of their ranks; empty without a
        cluster."""
        if self._meeting is None or not self._is_own:
            return []
        return [machine.name for machine in self._meeting.present()]

    def start(self) -> None:
        """Starts the ranks if none are alive. Jobs also do this."""
        with self._jobs():
            pass

    def stop(self) -> None:
        """Ends the ranks, after cancelling the running job and waiting ones."""
        if not self._is_own:
            return
        with self._one_stop:
            self._stop_wanted.set()
            self.cancel()
            try:
                with self._exclusive():
                    if self._group is not None:
                        self._group.stop()
                        self._group = None
                    if self._meeting is not None:  # also without a group, as machines may be joining
                        self._meeting.close()
            finally:
                self._stop_wanted.clear()

    def cancel(self) -> None:
        """Cancels the running job, from any thread. The call that runs it raises JobCancelled."""
        if self._running:
            self._cancel_requested.set()

    @contextmanager
    def _exclusive(self):
        """Allows one caller at a time. Raises RuntimeError in a callback of a running job, which would deadlock, and in
        a forked child."""
        if not self._is_own:
            raise RuntimeError(
                f"This Runtime belongs to process {self._pid}, and this is a forked child. Create another Runtime here."
            )
        if self._owner == threading.get_ident():
            raise RuntimeError("A callback of a running job cannot run another job. Return from the callback first.")
        try:
            with self._one_job:
                self._owner = threading.get_ident()
                try:
                    yield
                finally:
                    self._owner = None
        finally:
            self._free_if_wanted()

    def _free_if_wanted(self) -> None:
        """Frees the weights if `free` was called during the job. Its errors must not fail the job."""
        try:
            if self._free_wanted:
                self._free_if_idle()
        except (RankDied, RankError) as error:
            logger.warning("The ranks could not free their weights: %s", error)

    def _start(self, hooks: Hooks, sharded: bool) -> None:
        """Starts the ranks unless they are alive and can run the job. sharded: whether it shards weights by FSDP2."""
        sharded = (sharded or bool(self.parallel.fsdp)) and self.world_size > 1
        if isinstance(self._group, ClusterGroup):
            self._group.take_again(lambda: self._raise_if_cancelled(hooks))
        if self.alive and (self._group.may_shard or not sharded):
            return
        if self.alive:
            logger.info("The ranks start again, with the environment for FSDP2, and all weights are read again.")
            self._group.stop()
        elif self._group is not None:
            self._group.kill()
        self._held.forget()
        self._choices.forget()
        self._group = self._new_group(sharded)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, self._group.abandon)
        began = time.monotonic()
        try:
            self._group.start(lambda: self._raise_if_cancelled(hooks), hooks.on_notice)
        except BaseException:
            self._group = None
            raise
        self.device = self._group.kind
        logger.info("%d rank(s) on %s ready in %.1f s", self.world_size, self.device, time.monotonic() - began)

    def _new_group(self, sharded: bool) -> RankGroup | ClusterGroup:
        if self._meeting is not None:
            return ClusterGroup(self._meeting, self._asked_device)
        devices.warn_if_crowded(self.world_size, self.device)
        return RankGroup(self.world_size, self.device, self._environment, sharded)

    def free(self) -> None:
        """Frees the weights on all ranks; the ranks stay alive. Does nothing if none are alive.

        While a job runs, the weights are freed after it. Ranks that do not reply within submission.CANCEL_DEADLINE
        seconds are ended, which frees their memory too.
        """
        if self._is_own:
            self._free_wanted = True
            self._free_if_idle()

    def _free_if_idle(self) -> None:
        if not self._one_job.acquire(blocking=False):
            return  # the holder of the lock frees the weights when it is done
        try:
            wanted, self._free_wanted = self._free_wanted, False
            if wanted and self.alive:
                self._cancel_requested.clear()  # left over from the previous job
                self._submit(Free(job=next(self._numbers)), Hooks(), submission.CANCEL_DEADLINE)
        except RanksSilent:
            pass  # already logged
        finally:
            self._one_job.release()

    # One job

    def _do(self, make: MakeMessage, sharded: bool = False, **hooks) -> Result:
        with self._jobs(sharded, **hooks) as submit:
            return submit(make)

    @contextmanager
    def _jobs(self, sharded: bool = False, **hooks) -> Iterator[JobsOfCall]:
        """Yields what submits the jobs of one call. Starts ranks if none are alive. A cancel applies to the whole
        call. sharded: whether the jobs shard weights by FSDP2."""
        given = Hooks(**hooks)
        jobs = JobsOfCall(
            lambda make: self._submit(make(next(self._numbers)), given),
            lambda shards: self._start(given, shards),
            given,
            on_devices=lambda: self.device != "cpu",
        )
        with self._exclusive():
            self._cancel_requested.clear()
            self._running = True
            try:
                if self._stop_wanted.is_set():
                    raise JobCancelled("The job was cancelled, as the runtime is being stopped.")
                jobs.begin(sharded)
                yield jobs
            finally:
                self._running = False

    def _log_warnings(self, result: Result) -> None:
        """Logs each warning once, even if several jobs report it. Every job's result contains its warnings."""
        for warning in result.info.get("warnings", ()):
            if warning not in self._logged:
                self._logged.append(warning)
                logger.warning("%s", warning)

    def _raise_if_cancelled(self, hooks: Hooks) -> None:
        if self._cancel_requested.is_set() or hooks.should_cancel():
            raise JobCancelled("The job was cancelled while the ranks started.")

    def _submit(self, message: Message, hooks: Hooks, deadline: float | None = None) -> Result:
        pause = self._held.pause if isinstance(message, Velocity) else 0.0
        submitted = Submission(message, self._group, self._cancel_requested, hooks, deadline, pause)
        if isinstance(message, Free):
            self._held.forget()
            self._choices.forget()
        try:
            result = submitted.run()
        except BaseException:
            self._held.forget()  # ranks may have lost them, each for itself
            if submitted.unanswered:  # these ranks still work on the job, and nobody would read their answers
                self._group.kill()
            raise
        if isinstance(message, Velocity):
            self._held.pause = submitted.longest_pause
        self._log_warnings(result)
        return result
