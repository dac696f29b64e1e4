"""The group of ranks as one object: each call is one job, submitted, followed and answered.

`Runtime` starts the ranks with its first job and keeps them. A job that loses a rank raises RankDied, and the next
one starts a new group: descriptions travel with every job, so nothing else needs to be said again.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor

from . import devices, host, transport
from .acceleration import CALIBRATED, AccelerationSpec
from .checkpoints.calibration import read_calibration
from .checkpoints.layout import encoded_shape, frames_shape
from .launcher import Rank, RankGroup
from .protocol import Cancel, Conditioning, Decode, Done, Encode, EncodeVideo, Failed, Free, Load, Message, Ping
from .protocol import Preview, Progress, Sample
from .specs import (
    DiffusionModelSpec,
    OperatorSpec,
    ParallelSpec,
    ProfileSpec,
    SampleSpec,
    TextEncoderSpec,
    VaeSpec,
)
from .transport import ChannelClosed, SealedMessage

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # how often a running job asks whether it should be cancelled
PEER_DEADLINE = 10.0  # seconds for the other ranks to answer once one has failed; they may wait for it in vain
CANCEL_DEADLINE = 60.0  # seconds to answer a cancel, or three times the longest step where that is more

OnProgress = Callable[[str, int, int], None]  # (stage, step, total); of "load", bytes
OnPreview = Callable[[int, int, Tensor], None]  # (step, total, uint8 [H,W,3])
ShouldCancel = Callable[[], bool]


class JobCancelled(Exception):
    """The job was cancelled by its caller; the ranks are ready for the next one."""


class RankError(RuntimeError):
    """A rank failed in a way that is not the request's fault; its traceback is in the text."""


@dataclass(frozen=True)
class Result:
    """What a job returned. seconds: synchronised wall time by stage, of the slowest rank."""

    tensor: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


class Runtime:
    """Ranks that load, encode, sample and decode. A context manager; safe to use from several threads.

    parallel: how many ranks, and the plan that `sample` uses where it is not given one.
    device: "npu", "cuda", "cpu", or "auto" for the first of these that is there.
    environment: variables for the ranks alone.
    """

    def __init__(
        self,
        parallel: ParallelSpec = ParallelSpec(),
        device: str = "auto",
        environment: dict[str, str] | None = None,
    ):
        self.parallel = parallel
        self.device = devices.resolve_kind(device)
        self.world_size = devices.resolve_ranks(parallel.ranks, self.device, {**os.environ, **(environment or {})})
        self._environment = environment
        self._group: RankGroup | None = None
        self._numbers = itertools.count(1)
        self._one_job = threading.Lock()
        self._owner: int | None = None  # the thread that is inside
        self._running: int | None = None  # the number of its job
        self._cancel_requested = threading.Event()
        self._said: set[str] = set()  # warnings of jobs

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # Life

    @property
    def alive(self) -> bool:
        """Whether a group of ranks stands ready."""
        return self._group is not None and self._group.alive

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in order; empty where none are alive."""
        return [rank.process.pid for rank in self._group.ranks] if self.alive else []

    def start(self) -> None:
        """Starts the ranks if none are alive; jobs do so by themselves."""
        with self._exclusive():
            self._start(check=lambda: None)

    def stop(self) -> None:
        """Ends the ranks; a running job is cancelled first."""
        self.cancel()
        with self._exclusive():
            if self._group is not None:
                self._group.stop()
                self._group = None

    def cancel(self) -> None:
        """Asks the running job to end, from any thread; it raises JobCancelled where it was called."""
        if self._running is not None:
            self._cancel_requested.set()

    @contextmanager
    def _exclusive(self):
        """One caller at a time. Raises RuntimeError in a callback of a running job, which would wait for itself."""
        if self._owner == threading.get_ident():
            raise RuntimeError("A callback of a running job cannot ask its runtime for another; return from it first.")
        with self._one_job:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def _start(self, check: Callable[[], None]) -> None:
        if self.alive:
            return
        if self._group is not None:
            self._group.kill()
        devices.warn_if_crowded(self.world_size, self.device)
        self._group = RankGroup(self.world_size, self.device, self._environment)
        began = time.monotonic()
        try:
            self._group.start(check)
        except BaseException:
            self._group = None
            raise
        logger.info("%d rank(s) on %s ready in %.1f s", self.world_size, self.device, time.monotonic() - began)

    # Jobs

    def ping(self, tensor: Tensor | None = None, reply: int = 0, frames: tuple[int, ...] | None = None) -> Result:
        """Asks every rank for an answer. For measuring the way there and back.

        tensor travels to all ranks, `reply` floats come back, and the ranks fill `frames` [T,H,W,C] in fp32.
        """
        if frames is None:
            return self._do(lambda job: Ping(job=job, tensor=tensor, reply=reply))
        with transport.lend(frames, torch.float32) as (filled, shared):
            self._do(lambda job: Ping(job=job, frames=shared))
        return Result(filled)

    def load(
        self,
        model: DiffusionModelSpec | None = None,
        encoder: TextEncoderSpec | None = None,
        vae: VaeSpec | None = None,
        *,
        parallel: ParallelSpec | None = None,
        **hooks,
    ) -> Result:
        """Makes components ready ahead of the jobs that need them; `parallel` is these jobs' plan."""
        parallel = parallel or self.parallel
        return self._do(lambda job: Load(job=job, parallel=parallel, model=model, encoder=encoder, vae=vae), **hooks)

    def encode(self, encoder: TextEncoderSpec, text: str, **hooks) -> Result:
        """The embedding [1, 512, D] of a prompt, fp32, zeros behind its end."""
        return self._do(lambda job: Encode(job=job, encoder=encoder, text=text), **hooks)

    def sample(
        self,
        model: DiffusionModelSpec,
        spec: SampleSpec,
        latent: Tensor,
        positive: Tensor | Conditioning,
        negative: Tensor | Conditioning | None = None,
        *,
        noise_mask: Tensor | None = None,
        parallel: ParallelSpec | None = None,
        operators: OperatorSpec = OperatorSpec(),
        warm_up: bool = False,
        profile: ProfileSpec | None = None,
        acceleration: AccelerationSpec = AccelerationSpec(),
        on_preview: OnPreview | None = None,
        **hooks,
    ) -> Result:
        """The denoised latent [B,C,T,H,W], fp32 and not normalised.

        latent: where to start, not normalised; zeros for a new video (see `VideoSize.latent_shape`).
        positive, negative: embeddings [1, tokens, D], or what else a model of images sees beside them (`Conditioning`);
            negative may be missing where the guidance scale is 1.
        noise_mask: [B or 1, 1, T, H, W], 0 where `latent` is known and stays; how TI2V-5B continues a first frame.
        warm_up: before the first job of its kind (shapes, plan, operators) since the model was loaded, two steps are
            made and thrown away, so that what is compiled at first use does not count in the job's own seconds.
        profile: records these steps; `info["profile"]` of the result is the folder of the recording.
        acceleration: what is left out of the computation; `info["acceleration"]` of the result tells what was, and
            what that saved (see `accelerate.report.Tally.facts`).
        """
        profile = profile and _within(profile, spec.total_steps, self.world_size)
        cache = acceleration.step_cache
        calibrated = cache is not None and cache.method in CALIBRATED
        calibration = read_calibration(model.path) if calibrated else {}
        result = self._do(
            lambda job: Sample(
                job=job,
                model=model,
                parallel=parallel or self.parallel,
                spec=spec,
                latent=latent,
                positive=_conditioning(positive),
                negative=None if negative is None else _conditioning(negative),
                noise_mask=noise_mask,
                operators=operators,
                warm_up=warm_up,
                profile=profile,
                acceleration=acceleration,
                calibration=calibration,
                preview=on_preview is not None,
            ),
            on_preview=on_preview,
            **hooks,
        )
        _log_extras(result, profile)
        return result

    def decode(self, vae: VaeSpec, latent: Tensor, **hooks) -> Result:
        """The frames [B*T,H,W,3] in 0..1 of a latent [B,C,T,H,W], in memory that the ranks wrote to."""
        shape = frames_shape(vae.path, latent.shape)
        with transport.lend(shape, torch.float32) as (image, shared):
            done = self._do(lambda job: Decode(job=job, vae=vae, latent=latent, frames=shared), **hooks)
        return Result(image, done.seconds, done.info)

    def encode_video(self, vae: VaeSpec, frames: Tensor, **hooks) -> Result:
        """The latent [1,C,T',H',W'], fp32 and not normalised, of frames [T,H,W,3] in 0..1; T is 4n+1."""
        shape = encoded_shape(vae.path, frames.shape)
        with transport.lend(shape, torch.float32) as (latent, shared):
            done = self._do(lambda job: EncodeVideo(job=job, vae=vae, frames=frames, latent=shared), **hooks)
        return Result(latent, done.seconds, done.info)

    def free(self) -> None:
        """Drops the weights of all ranks; the ranks stay. Nothing happens where none are alive."""
        with self._exclusive():
            if self.alive:
                self._submit(Free(job=next(self._numbers)), _Hooks())

    # One job

    def _do(self, make: Callable[[int], Message], **hooks) -> Result:
        """Submits the job that `make(number)` describes, starting ranks for it if none are alive."""
        hooks = _Hooks(**hooks)
        with self._exclusive():
            self._cancel_requested.clear()
            self._running = next(self._numbers)  # a wish to cancel counts from here on, while ranks start too
            try:
                self._start(lambda: self._raise_if_cancelled(hooks))
                result = self._submit(make(self._running), hooks)
                self._log_warnings(result)
                return result
            finally:
                self._running = None

    def _log_warnings(self, result: Result) -> None:
        """Each once, however many jobs bring it; every job's result has its own."""
        for warning in result.info.get("warnings", ()):
            if warning not in self._said:
                self._said.add(warning)
                logger.warning("%s", warning)

    def _raise_if_cancelled(self, hooks: _Hooks) -> None:
        if self._cancel_requested.is_set() or hooks.should_cancel():
            raise JobCancelled("The job was cancelled while the ranks started.")

    def _submit(self, message: Message, hooks: _Hooks) -> Result:
        submission = _Submission(message, self._group, self._cancel_requested, hooks)
        try:
            return submission.run()
        except BaseException:
            if submission.waiting:  # ranks are still at work on it, and nobody will hear their answer
                self._group.kill()
            raise


def _conditioning(given: Tensor | Conditioning) -> Conditioning:
    return Conditioning(text=given) if isinstance(given, Tensor) else given


def _within(profile: ProfileSpec, steps: int | None, ranks: int) -> ProfileSpec:
    """What the job can record of `profile`, as far as it is known before the model is loaded. Raises ValueError where
    that is nothing."""
    possible = profile.within(steps or profile.last_step, ranks)
    if possible != profile:
        logger.info("The recording ends with step %d, the job's last, not with step %d.", steps, profile.last_step)
    return possible


def _log_extras(result: Result, profile: ProfileSpec | None) -> None:
    """Tells of a warm-up and of a recording."""
    if "warm up" in result.seconds:
        logger.info("warm-up took %.1f s", result.seconds["warm up"])
    if profile is None:
        return
    steps = f"steps {profile.first_step} to {profile.last_step} on rank {profile.rank}"
    if "profile" in result.info:
        logger.info("Recorded %s: %s", steps, result.info["profile"])
    else:  # torch_npu's profiler says what went wrong in the rank's output alone
        logger.warning("The profiler has written nothing of %s into %s.", steps, profile.folder)


@dataclass(frozen=True)
class _Hooks:
    """What the caller of a job wants to be told and asked meanwhile."""

    on_progress: OnProgress = lambda stage, step, total: None
    on_preview: OnPreview | None = None
    should_cancel: ShouldCancel = lambda: False


class _Submission:
    """One job from its submission to the last rank's answer."""

    def __init__(self, message: Message, group: RankGroup, cancel_requested: threading.Event, hooks: _Hooks):
        self.message = message
        self.group = group
        self.cancel_requested = cancel_requested
        self.hooks = hooks
        self.waiting = {rank.channel.fileno(): rank for rank in group.ranks}
        self.answers: dict[int, Done | Failed] = {}
        self.caller_error: Exception | None = None
        self.cancel_sent = False
        self.give_up_at: float | None = None
        self.last_heard = time.monotonic()
        self.longest_silence = 0.0

    def run(self) -> Result:
        try:
            self._broadcast(self.message)
            poll = select.poll()
            for descriptor in self.waiting:
                poll.register(descriptor, select.POLLIN)
            while self.waiting:
                for descriptor, _ in poll.poll(POLL_SECONDS * 1000):
                    if self._hear(descriptor):
                        poll.unregister(descriptor)
                self._look_around()
        except ChannelClosed:
            raise self.group.died(f"the job {type(self.message).__name__.lower()!r}") from None
        if self.caller_error is not None:
            raise self.caller_error
        result = self._result()
        if self.cancel_sent:  # too late for the ranks, but what was to follow must not begin
            raise JobCancelled("The job was cancelled.")
        return result

    def _broadcast(self, message: Message) -> None:
        with SealedMessage(message) as sealed:
            for rank in self.group.ranks:
                rank.channel.send_sealed(sealed)

    def _hear(self, descriptor: int) -> bool:
        """Takes one message of a rank; True if it was its answer."""
        rank = self.waiting[descriptor]
        message = rank.channel.receive()
        now = time.monotonic()
        self.longest_silence = max(self.longest_silence, now - self.last_heard)
        self.last_heard = now
        if isinstance(message, Progress):
            self._tell(self.hooks.on_progress, message.stage, message.step, message.total)
        elif isinstance(message, Preview):
            self._tell(self.hooks.on_preview, message.step, message.total, message.image)
        else:
            self._take_answer(rank, message)
            del self.waiting[descriptor]
            return True
        return False

    def _take_answer(self, rank: Rank, message: Message) -> None:
        assert isinstance(message, (Done, Failed)) and message.job == self.message.job, message
        self.answers[rank.rank] = message
        if isinstance(message, Failed) and message.kind != "cancelled" and self.give_up_at is None:
            self.give_up_at = time.monotonic() + PEER_DEADLINE

    def _tell(self, callback: Callable, *arguments) -> Any:
        """Calls back the caller. Its exception cancels the job, and is raised once the ranks are done with it."""
        try:
            return callback(*arguments)
        except Exception as error:
            self.caller_error = self.caller_error or error

    def _look_around(self) -> None:
        """Relays a wish to cancel; gives up on ranks that have died, hang, or wait for one that failed."""
        if self.group.lost:
            raise ChannelClosed  # though something that the rank started holds its connection open
        if not self.cancel_sent:
            if self.cancel_requested.is_set() or self._tell(self.hooks.should_cancel) or self.caller_error is not None:
                self.cancel_sent = True
                self.give_up_at = time.monotonic() + max(CANCEL_DEADLINE, 3 * self.longest_silence)
                self._broadcast(Cancel(job=self.message.job))
        if self.waiting and self.give_up_at is not None and time.monotonic() > self.give_up_at:
            self._give_up()

    def _give_up(self) -> None:
        if self.answers:
            self._result()  # raises what a rank has reported
        silent = ", ".join(str(rank.rank) for rank in self.waiting.values())
        raise JobCancelled(f"The job was cancelled. Rank {silent} did not answer in time, so the group was ended.")

    def _result(self) -> Result:
        """The answers as one; raises the most telling failure."""
        answers = [self.answers[rank] for rank in sorted(self.answers)]
        failures = [answer for answer in answers if isinstance(answer, Failed)]
        if failures:
            order = ("user", "internal", "peer", "cancelled")
            failure = min(failures, key=lambda failed: order.index(failed.kind))
            if failure.kind == "user":
                logger.debug("%s", failure.traceback)
                raise ValueError(failure.error)
            if failure.kind == "cancelled":
                raise JobCancelled(failure.error)
            raise RankError(f"{host.advise(failure.error)}\n{failure.traceback}")
        stages = {stage for answer in answers for stage in answer.seconds}
        seconds = {stage: max(answer.seconds.get(stage, 0.0) for answer in answers) for stage in sorted(stages)}
        info = {name: fact for answer in reversed(answers) for name, fact in answer.info.items()}  # rank 0's count most
        return Result(answers[0].tensor, seconds, info)
