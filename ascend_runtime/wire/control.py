"""The messages that a machine's relay reads or writes itself, and the base class of all messages.

Does not import torch.
"""

from __future__ import annotations

from msgspec import Struct


class Message(Struct, tag=True, kw_only=True):
    """The base class of all messages."""


class Cancel(Message):
    """Cancels a running job."""

    job: int


class Shutdown(Message):
    """Ends the rank."""


class Located(Message):
    """Where a rank is that a client did not start: the machine's name, and `Welcome.paths`. Comes with each client that
    connects."""

    machine: str
    paths: dict[str, str] = {}


class Wrote(Message):
    """A rank has written a part of lent memory, as in `envelopes.Region`. Only ranks that a client did not start say
    so."""

    job: int
    lent: int
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    itemsize: int


class Heading(Struct, kw_only=True):
    """What a relay reads of a message that it only passes on. type: the message's class."""

    type: str
    job: int = 0
