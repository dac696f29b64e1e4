"""The connections that a job's messages travel on, as `Submission` sees them: one for each rank of this machine, or one
for all ranks of another machine (machines/machine.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from ..wire.channel import Channel, SealedMessage
from ..wire.messages import Message, Undecodable

COMPUTING = "is computing"  # what `GroupOfRanks.doing` says of a rank that has a reason to be silent


class RankLink(Protocol):
    """A connection to some ranks of a group. Nothing of it blocks.

    ranks: their numbers. unsent: whether posted data is still waiting to be sent. waiting: whether data has arrived
    that a poll of `fileno` does not show.
    """

    ranks: tuple[int, ...]
    unsent: bool
    waiting: bool

    def fileno(self) -> int: ...

    def post(self, sealed: SealedMessage, ranks: Collection[int], job: int = 0) -> None:
        """Sends a message to those of its ranks that are in `ranks`, as far as possible now. job: which they must
        answer; 0: none. Raises ChannelClosed."""

    def flush(self) -> None:
        """Sends posted data as far as possible now. Raises ChannelClosed."""

    def take(self) -> tuple[int, Message] | None:
        """(rank, its next message), or None if no message has arrived completely. Raises ChannelClosed, and Undecodable
        with a text that names the rank."""


class GroupOfRanks(Protocol):
    """What a job needs of ranks that start and end together.

    kills_before: the number of processes that the kernel had killed on this host when the running job began.
    """

    world_size: int
    kills_before: int

    @property
    def links(self) -> Sequence[RankLink]: ...

    @property
    def lost(self) -> bool:
        """Whether a rank has died unexpectedly."""

    def died(self, doing: str) -> RuntimeError:
        """The error for a job that lost a rank."""

    def doing(self, rank: int) -> str:
        """What a rank does, or where it is, such as "is waiting"."""


class ChannelLink:
    """The link to one rank of this machine."""

    waiting = False  # a channel reads no further than the message that it returns

    def __init__(self, rank: int, channel: Channel):
        self.ranks = (rank,)
        self._channel = channel
        self.fileno, self.flush = channel.fileno, channel.flush

    @property
    def unsent(self) -> bool:
        return self._channel.unsent

    def post(self, sealed: SealedMessage, ranks: Collection[int], job: int = 0) -> None:
        if self.ranks[0] in ranks:
            self._channel.post(sealed)

    def take(self) -> tuple[int, Message] | None:
        (rank,) = self.ranks
        try:
            message = self._channel.take()
        except Undecodable as error:
            raise Undecodable(f"Rank {rank} sent an invalid answer. {error}") from None
        return None if message is None else (rank, message)
