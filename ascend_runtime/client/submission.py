"""One job on its way: given to all ranks, followed while they work, cancelled, answered. Waits for no rank without a
deadline, or an eye on whether it lives."""

from __future__ import annotations

import logging
import select
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable

from torch import Tensor

from ..hardware import host
from ..wire.channel import ChannelClosed, SealedMessage
from ..wire.messages import UNREAD, Cancel, Conditioning, Done, Failed, Message, Preview, Progress, Undecodable
from .group import COMPUTING, Rank, RankGroup

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # how often a running job asks whether it should be cancelled
PEER_DEADLINE = 10.0  # seconds for the other ranks to answer once one has failed; they may wait for it in vain
CANCEL_DEADLINE = 60.0  # seconds to answer a cancel, or three times the longest step where that is more
SILENCE = 60.0  # seconds without a word after which it is said who keeps a job waiting; at least, see LONGER
LONGER = 5  # times as long as it ever took before within the job

OnProgress = Callable[[str, int, int], None]  # (stage, step, total); of "load", bytes
OnPreview = Callable[[int, int, Tensor], None]  # (step, total, uint8 [H,W,3])
OnNotice = Callable[[str], None]  # a sentence that the user should read now
ShouldCancel = Callable[[], bool]


class JobCancelled(Exception):
    """The job was cancelled by its caller; the ranks are ready for the next one."""


class RankError(RuntimeError):
    """A rank failed in a way that is not the request's fault; its traceback is in the text."""


class RanksSilent(RankError):
    """Ranks did not answer within the job's deadline."""


@dataclass(frozen=True)
class Result:
    """What a job returned. tensors: further results by name. seconds: synchronised wall time by stage, of the slowest
    rank."""

    tensor: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def conditioning(self) -> Conditioning:
        """Of an encoded prompt: what `Runtime.sample` takes."""
        return Conditioning(text=self.tensor, pooled=self.tensors.get("pooled"))


@dataclass(frozen=True)
class Hooks:
    """What the caller of a job hears meanwhile, and is asked.

    on_notice: is called where ranks keep the job waiting for much longer than before.
    """

    on_progress: OnProgress = lambda stage, step, total: None
    on_preview: OnPreview | None = None
    on_notice: OnNotice = lambda text: None
    should_cancel: ShouldCancel = lambda: False


class Submission:
    """One job from its submission to the last rank's answer.

    deadline: seconds for all answers; None where the work may take any time.
    """

    def __init__(
        self,
        message: Message,
        group: RankGroup,
        cancel_requested: threading.Event,
        hooks: Hooks,
        deadline: float | None = None,
    ):
        self.message = message
        self.group = group
        self.cancel_requested = cancel_requested
        self.hooks = hooks
        self.unanswered: dict[int, Rank] = {}  # ranks that are at work on it, by the descriptor of their channel
        self._answers: dict[int, Done | Failed] = {}
        self._caller_error: BaseException | None = None
        self._cancel_sent = False
        self._give_up_at = None if deadline is None else time.monotonic() + deadline
        self._silence = _Silence()

    def run(self) -> Result:
        """Raises ValueError where the request is at fault, JobCancelled, RankError, RankDied, what a callback raised.
        Ranks left in `unanswered` then are of no use any more."""
        with SealedMessage(self.message) as sealed:  # what cannot be sent is refused here, while no rank is at work yet
            self.unanswered = {rank.channel.fileno(): rank for rank in self.group.ranks}
            try:
                self._follow(sealed)
            except ChannelClosed:
                raise self.group.died(f"the job {type(self.message).__name__.lower()!r}") from None
        if self._caller_error is not None:
            raise self._caller_error
        result = self._result()
        if self._cancel_sent:  # too late for the ranks, but what was to follow must not begin
            raise JobCancelled("The job was cancelled.")
        return result

    def _follow(self, sealed: SealedMessage) -> None:
        """Until all ranks have answered. An interrupt from the keyboard is a wish to cancel; a second one is obeyed at
        once."""
        for rank in self.group.ranks:
            rank.channel.post(sealed)
        poll = select.poll()
        while self.unanswered:
            try:
                self._turn(poll)
            except KeyboardInterrupt as interrupt:
                if self._caller_error is not None:
                    raise
                self._caller_error = interrupt

    def _turn(self, poll: select.poll) -> None:
        for descriptor, rank in self.unanswered.items():
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if rank.channel.unsent else 0))
        heard = poll.poll(POLL_SECONDS * 1000)
        self._relay_cancel()  # before what the ranks have said meanwhile is looked at, which may be much
        for descriptor, _ in heard:
            rank = self.unanswered[descriptor]
            rank.channel.flush()
            message = self._taken(rank)  # one a turn: a wish to cancel is heard in between
            if message is not None:
                self._hear(descriptor, message)
            if descriptor not in self.unanswered:
                poll.unregister(descriptor)
        self._look_around()

    def _taken(self, rank: Rank) -> Message | None:
        try:
            return rank.channel.take()
        except Undecodable as error:
            raise RankError(f"Rank {rank.rank} sent an answer that cannot be read. {error}") from None

    def _hear(self, descriptor: int, message: Message) -> None:
        if seconds := self._silence.broken():
            self._notice(f"The ranks report again, after {seconds:.0f} s.", logging.INFO)
        if isinstance(message, Progress):
            self._call(self.hooks.on_progress, message.stage, message.step, message.total)
        elif isinstance(message, Preview):
            if self.hooks.on_preview is not None:
                self._call(self.hooks.on_preview, message.step, message.total, message.image)
        else:
            self._take_answer(self.unanswered[descriptor], message)
            del self.unanswered[descriptor]

    def _take_answer(self, rank: Rank, message: Message) -> None:
        unread = isinstance(message, Failed) and message.job == UNREAD
        if not unread and not (isinstance(message, (Done, Failed)) and message.job == self.message.job):
            raise RankError(f"Rank {rank.rank} answered with a {type(message).__name__}, which is not of this job.")
        self._answers[rank.rank] = message
        if isinstance(message, Failed) and message.kind != "cancelled" and not self._cancel_sent:
            self._give_up_within(PEER_DEADLINE)

    def _call(self, callback: Callable, *arguments) -> Any:
        """Calls back the caller. Whatever it raises cancels the job, and is raised once the ranks are done with it:
        ComfyUI's interrupt is no Exception in its newer versions, and must not cost the ranks either."""
        try:
            return callback(*arguments)
        except BaseException as error:
            self._caller_error = self._caller_error or error

    def _look_around(self) -> None:
        """What has to be seen to while the ranks work."""
        if self.group.lost:
            raise ChannelClosed  # though something that the rank started holds its connection open
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
            for rank in self.unanswered.values():
                rank.channel.post(sealed)

    def _give_up_within(self, seconds: float) -> None:
        """The first deadline stays, where there is one."""
        at = time.monotonic() + seconds
        self._give_up_at = at if self._give_up_at is None else min(self._give_up_at, at)

    def _give_up(self) -> None:
        silent = _numbered(self.unanswered.values())
        text = f"{silent} did not answer in time, so the group was ended. The next job starts a new one."
        self._notice(f"{text} Last seen: {self._states()}.")
        if self._caller_error is not None:
            raise self._caller_error
        if any(isinstance(answer, Failed) and answer.kind != "cancelled" for answer in self._answers.values()):
            self._result()  # raises what a rank has reported
        if self._cancel_sent:
            raise JobCancelled(f"The job was cancelled. {text}")
        raise RanksSilent(text)

    def _notice_silence(self) -> None:
        """A first step, or a large model on a CPU, takes its time: that is no reason to worry somebody."""
        seconds, ranks = self._silence.seconds, self.unanswered.values()
        if all(rank.doing == COMPUTING for rank in ranks):
            self._notice(f"The ranks have been computing for {seconds:.0f} s since they last reported.", logging.INFO)
            return
        longest = f"; the longest pause before was {self._silence.longest:.0f} s" if self._silence.longest > 1 else ""
        self._notice(
            f"No word from the ranks for {seconds:.0f} s{longest}. {self._states()}. Cancel ends the job, and also "
            "ranks that do not answer it."
        )

    def _notice(self, text: str, level: int = logging.WARNING) -> None:
        """For the log and the caller, whose error in showing it costs no job."""
        logger.log(level, "%s", text)
        try:
            self.hooks.on_notice(text)
        except Exception:
            logger.exception("on_notice failed")
        except BaseException as interrupt:
            self._caller_error = self._caller_error or interrupt

    def _states(self) -> str:
        """What each rank that has not answered is seen to do."""
        return ", ".join(f"Rank {rank.rank} {rank.doing}" for rank in self.unanswered.values())

    def _result(self) -> Result:
        """The answers as one; raises the failure that says most."""
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
            raise RankError(f"{host.advise(failure.error)}\n{failure.traceback}")
        stages = {stage for answer in answers for stage in answer.seconds}
        seconds = {stage: max(answer.seconds.get(stage, 0.0) for answer in answers) for stage in sorted(stages)}
        info = {name: fact for answer in reversed(answers) for name, fact in answer.info.items()}  # rank 0's count most
        return Result(answers[0].tensor, answers[0].tensors, seconds, info)


class _Silence:
    """How long no rank has said anything, and how long that ever took before.

    longest: seconds.
    """

    def __init__(self):
        self.longest = 0.0
        self._since = time.monotonic()
        self._said_at = 0.0  # seconds of silence at which it was last spoken of

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def broken(self) -> float:
        """Somebody has said something. Returns the seconds of a silence that was spoken of, else 0."""
        seconds, said = self.seconds, self._said_at > 0
        self.longest = max(self.longest, seconds)
        self._since, self._said_at = time.monotonic(), 0.0
        return seconds if said else 0.0

    def is_long(self) -> bool:
        """True once it lasts much longer than before, and again each time it has doubled."""
        if self.seconds < max(SILENCE, LONGER * self.longest, 2 * self._said_at):
            return False
        self._said_at = self.seconds
        return True


def _numbered(ranks) -> str:
    numbers = [str(rank.rank) for rank in ranks]
    return f"Rank {numbers[0]}" if len(numbers) == 1 else f"Ranks {', '.join(numbers)}"
