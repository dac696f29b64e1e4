"""Submits one job to all ranks, relays progress and a cancel, and collects the answers. Never waits for a rank without
a deadline, or without checking that it is alive."""

from __future__ import annotations

import logging
import select
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable

from msgspec.structs import replace
from torch import Tensor

from ..errors import coded
from ..hardware import host, memory
from ..specs.record import JobRecord
from ..wire.channel import ChannelClosed, SealedMessage
from ..wire.messages import UNREAD, Cancel, Conditioning, Done, Failed, Message, Preview, Progress, Undecodable
from ..wire.plans import Chosen
from .links import COMPUTING, GroupOfRanks, RankLink
from .rank_words import ranks_in_words

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # interval of checks for a cancel
PEER_DEADLINE = 10.0  # seconds for other ranks to answer after one has failed, as they may wait for it in a collective
CANCEL_DEADLINE = 60.0  # seconds to answer a cancel; at least three times the longest pause between reports
SILENCE = 60.0  # minimum seconds without a report before a notice; see LONGER
LONGER = 5  # a notice needs a pause this many times as long as the job's longest one

OnProgress = Callable[[str, int, int], None]  # (stage, step, total); bytes for "load"
OnPreview = Callable[[int, int, Tensor], None]  # (step, total, uint8 [H,W,3])
OnNotice = Callable[[str], None]  # a sentence for the user
ShouldCancel = Callable[[], bool]


class JobCancelled(Exception):
    """The caller cancelled the job. The ranks are ready for the next one."""


class RankError(RuntimeError):
    """A rank failed although the request is valid; the text contains its traceback."""


class RanksSilent(RankError):
    """Ranks did not answer within the job's deadline."""


@dataclass(frozen=True)
class Result:
    """The result of a job. tensors: further results by name. seconds: synchronised wall time of each stage, on the
    slowest rank. record: what a video's metadata say about the job, if it makes a part of one."""

    tensor: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    record: JobRecord | None = None

    @property
    def conditioning(self) -> Conditioning:
        """The conditioning of an encoded prompt, for `Runtime.sample`."""
        return Conditioning(text=self.tensor, pooled=self.tensors.get("pooled"))


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a running job.

    on_notice: called if ranks do not report for much longer than before, or a job begins again.
    on_plan: called before a job with the plan that was chosen for it.
    """

    on_progress: OnProgress = lambda stage, step, total: None
    on_preview: OnPreview | None = None
    on_notice: OnNotice = lambda text: None
    on_plan: Callable[[Chosen], None] = lambda plan: None
    should_cancel: ShouldCancel = lambda: False


class Submission:
    """One job, from its submission to the last rank's answer.

    deadline: seconds until all ranks must have answered; None for no limit. pause: the longest one between reports of
    jobs like this one so far, in seconds.
    """

    def __init__(
        self,
        message: Message,
        group: GroupOfRanks,
        cancel_requested: threading.Event,
        hooks: Hooks,
        deadline: float | None = None,
        pause: float = 0.0,
    ):
        self.message = message
        self.group = group
        self.cancel_requested = cancel_requested
        self.hooks = hooks
        self.unanswered: set[int] = set()  # ranks that have not answered
        self._links: dict[int, RankLink] = {}  # those with such ranks, by their descriptor
        self._answers: dict[int, Done | Failed] = {}
        self._caller_error: BaseException | None = None
        self._cancel_sent = False
        self._give_up_at = None if deadline is None else time.monotonic() + deadline
        self._silence = _Silence(pause)

    @property
    def longest_pause(self) -> float:
        """Of this job and those like it, in seconds."""
        return self._silence.longest

    def run(self) -> Result:
        """Runs the job. Raises ValueError for an invalid request, JobCancelled, RankError, RankDied, or a callback's
        exception. If `unanswered` is not empty then, the group must be killed."""
        self.group.kills_before = memory.kills()
        with SealedMessage(self.message) as sealed:  # raises before any rank gets the job
            self._links = {link.fileno(): link for link in self.group.links}
            self.unanswered = {rank for link in self._links.values() for rank in link.ranks}
            try:
                self._follow(sealed)
            except ChannelClosed:
                raise self.group.died(f"the job {type(self.message).__name__.lower()!r}") from None
        if self._caller_error is not None:
            raise self._caller_error
        result = self._result()
        if self._cancel_sent:  # the ranks finished before the cancel arrived, but the caller must not continue
            raise JobCancelled("The job was cancelled.")
        return result

    def _follow(self, sealed: SealedMessage) -> None:
        """Waits until all ranks have answered. The first KeyboardInterrupt cancels the job, the second one is raised at
        once."""
        for link in self._links.values():
            link.post(sealed, self.unanswered, self.message.job)
        poll = select.poll()
        while self.unanswered:
            try:
                self._turn(poll)
            except KeyboardInterrupt as interrupt:
                if self._caller_error is not None:
                    raise
                self._caller_error = interrupt

    def _turn(self, poll: select.poll) -> None:
        held = []  # links with data that a poll does not show
        for descriptor, link in self._links.items():
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if link.unsent else 0))
            if link.waiting:
                held.append(descriptor)
        ready = poll.poll(0 if held else POLL_SECONDS * 1000)
        self._relay_cancel()  # first, as there may be many messages
        for descriptor in dict.fromkeys([descriptor for descriptor, _ in ready] + held):
            link = self._links[descriptor]
            link.flush()
            taken = self._taken(link)  # one per turn, so that a cancel is relayed in between
            if taken is not None:
                self._receive(*taken)
            if self.unanswered.isdisjoint(link.ranks):
                del self._links[descriptor]
                poll.unregister(descriptor)
        self._check_ranks()

    def _taken(self, link: RankLink) -> tuple[int, Message] | None:
        try:
            return link.take()
        except Undecodable as error:
            raise RankError(coded("AV-1507", str(error))) from None

    def _receive(self, rank: int, message: Message) -> None:
        if seconds := self._silence.end():
            self._notice(f"The ranks report again after {seconds:.0f} s.", logging.INFO)
        if isinstance(message, Progress):
            self._call(self.hooks.on_progress, message.stage, message.step, message.total)
        elif isinstance(message, Preview):
            if self.hooks.on_preview is not None:
                self._call(self.hooks.on_preview, message.step, message.total, message.image)
        else:
            self._take_answer(rank, message)
            self.unanswered.discard(rank)

    def _take_answer(self, rank: int, message: Message) -> None:
        unread = isinstance(message, Failed) and message.job == UNREAD
        fits = unread or isinstance(message, (Done, Failed)) and message.job == self.message.job
        if not fits or rank not in self.unanswered:
            raise RankError(
                coded("AV-1507", f"Rank {rank} sent {type(message).__name__}, which is not an answer to this job.")
            )
        self._answers[rank] = message
        if isinstance(message, Failed) and message.kind != "cancelled" and not self._cancel_sent:
            self._give_up_within(PEER_DEADLINE)

    def _call(self, callback: Callable, *arguments) -> Any:
        """Calls a hook. Any exception cancels the job, and is raised when the ranks have ended it. It catches
        BaseException, as ComfyUI's interrupt is not an Exception in newer versions."""
        try:
            return callback(*arguments)
        except BaseException as error:
            self._caller_error = self._caller_error or error

    def _check_ranks(self) -> None:
        """Checks for dead ranks, a cancel, silent ranks, and the deadline."""
        if self.group.lost:
            raise ChannelClosed  # another process may keep the dead rank's connection open
        self._relay_cancel()
        if self.unanswered and self._give_up_at is None and self._silence.is_long():
            self._notice_silence()
        if self.unanswered and self._give_up_at is not None and time.monotonic() > self._give_up_at:
            self._give_up()

    def _cancel_wanted(self) -> bool:
        wanted = self.cancel_requested.is_set() or self._call(lambda: bool(self.hooks.should_cancel()))
        return wanted is True or self._caller_error is not None

    def _relay_cancel(self) -> None:
        if self._cancel_sent or not self._cancel_wanted():
            return
        self._cancel_sent = True
        self._give_up_within(max(CANCEL_DEADLINE, 3 * self._silence.longest))
        with SealedMessage(Cancel(job=self.message.job)) as sealed:
            for link in self._links.values():
                link.post(sealed, self.unanswered)

    def _give_up_within(self, seconds: float) -> None:
        """Sets a deadline, unless an earlier one is set."""
        at = time.monotonic() + seconds
        self._give_up_at = at if self._give_up_at is None else min(self._give_up_at, at)

    def _give_up(self) -> None:
        silent = ranks_in_words(self.unanswered).capitalize()
        text = f"{silent} did not answer in time, so the group was ended. The next job starts a new one."
        self._notice(f"{text} Last state: {self._states()}.")
        if self._caller_error is not None:
            raise self._caller_error
        if any(isinstance(answer, Failed) and answer.kind != "cancelled" for answer in self._answers.values()):
            self._result()  # raises the reported error
        if self._cancel_sent:
            raise JobCancelled(f"The job was cancelled. {text}")
        raise RanksSilent(coded("AV-1506", text))

    def _notice_silence(self) -> None:
        """Notifies the user that ranks are silent. That is no warning if all are computing, as in a slow first step."""
        seconds = self._silence.seconds
        if all(self.group.doing(rank) == COMPUTING for rank in self.unanswered):
            self._notice(f"The ranks have been computing for {seconds:.0f} s since they last reported.", logging.INFO)
            return
        longest = f"; the longest pause before was {self._silence.longest:.0f} s" if self._silence.longest > 1 else ""
        self._notice(
            f"The ranks have not reported for {seconds:.0f} s{longest}. {self._states()}. Cancel ends the job, and "
            "also ranks that do not respond to it."
        )

    def _notice(self, text: str, level: int = logging.WARNING) -> None:
        """Logs a text and passes it to on_notice, whose errors do not fail the job."""
        logger.log(level, "%s", text)
        try:
            self.hooks.on_notice(text)
        except Exception:
            logger.exception("on_notice failed")
        except BaseException as interrupt:
            self._caller_error = self._caller_error or interrupt

    def _states(self) -> str:
        """The state of each rank that has not answered."""
        return ", ".join(f"Rank {rank} {self.group.doing(rank)}" for rank in sorted(self.unanswered))

    def _result(self) -> Result:
        """Merges the answers of all ranks; raises the most informative failure."""
        answers = [self._answers[rank] for rank in sorted(self._answers)]
        failures = [answer for answer in answers if isinstance(answer, Failed)]
        if failures:
            order = ("user", "internal", "peer", "cancelled")
            failure = min(failures, key=lambda failed: order.index(failed.kind))
            if failure.kind == "user":
                logger.debug("%s", failure.traceback)
                raise ValueError(failure.error)
            if failure.kind == "cancelled":
                raise JobCancelled(failure.error)
            raise RankError(f"{host.advise(failure.error, 'AV-1510')}\n{failure.traceback}")
        stages = {stage for answer in answers for stage in answer.seconds}
        seconds = {stage: max(answer.seconds.get(stage, 0.0) for answer in answers) for stage in sorted(stages)}
        info = {name: fact for answer in reversed(answers) for name, fact in answer.info.items()}  # rank 0 wins
        rounded = {stage: round(taken, 4) for stage, taken in seconds.items()}
        record = answers[0].record and replace(answers[0].record, seconds=rounded)
        return Result(answers[0].tensor, answers[0].tensors, seconds, info, record)


class _Silence:
    """Measures the time since any rank last reported. longest: the longest pause of the job so far, in seconds."""

    def __init__(self, longest: float = 0.0):
        self.longest = longest
        self._since = time.monotonic()
        self._noticed_at = 0.0  # length of the current pause at the last notice, in seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def end(self) -> float:
        """Records a report. Returns the length of the pause in seconds if there was a notice about it, else 0."""
        seconds, noticed = self.seconds, self._noticed_at > 0
        self.longest = max(self.longest, seconds)
        self._since, self._noticed_at = time.monotonic(), 0.0
        return seconds if noticed else 0.0

    def is_long(self) -> bool:
        """True when the pause is much longer than before, and again each time it has doubled."""
        if self.seconds < max(SILENCE, LONGER * self.longest, 2 * self._noticed_at):
            return False
        self._noticed_at = self.seconds
        return True
