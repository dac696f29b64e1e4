"""What a client and a machine of a cluster send each other, around the messages of the machine's ranks.

A machine has one connection to the client, that of its relay (engine/machine/relay/). An envelope says what its payload
is, so that the payload can be received where it belongs, without a copy. Does not import torch.
"""

from __future__ import annotations

from msgspec import Struct

PROTOCOL = 1  # of envelopes and messages; a client and a machine must have the same


class Envelope(Struct, tag=True, kw_only=True):
    """The base class of all envelopes."""


class Hello(Envelope):
    """A machine's first envelope. Every version of the pack can read every other's, so that a mismatch can be named.

    pack: its version. ranks: the numbers of this machine's ranks. world_size: of all machines. device: "npu", "cuda" or
    "cpu". packages: the versions of those that ranks must have in common, by name.
    """

    pack: str
    protocol: int
    machine: str = ""
    ranks: tuple[int, ...] = ()
    world_size: int = 0
    device: str = ""
    packages: dict[str, str] = {}


class Welcome(Envelope):
    """The client's answer to a Hello. paths: of folders, as the client's specs have them, to this machine's."""

    paths: dict[str, str] = {}


class Rejected(Envelope):
    """The client's other answer, after which it closes the connection. lasting: asking again is of no use."""

    reason: str
    lasting: bool = True


class Here(Envelope):
    """A rank has connected to its machine's relay. It is ready when its message Ready follows."""

    rank: int


class Deliver(Envelope, kw_only=True):
    """A message for ranks of this machine. The payload is its body, and then its block of tensors.

    job: which the ranks must answer; 0: none. body, block: bytes. lent: the bytes of each memory that the client lends,
    which the machine allocates instead; what ranks write there comes back as `Region`.
    """

    ranks: tuple[int, ...]
    job: int = 0
    body: int
    block: int = 0
    lent: tuple[int, ...] = ()


class FromRank(Envelope, kw_only=True):
    """A message of a rank. The payload is its body, and then its block of tensors; both in bytes."""

    rank: int
    body: int
    block: int = 0


class Region(Envelope):
    """A part of the lent memory number `lent` of a job, which a rank has written. The payload is its content, without
    gaps. shape: of the whole tensor. starts, sizes: of the part, along each axis. itemsize: bytes of an element."""

    job: int
    lent: int
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    itemsize: int


class Gone(Envelope):
    """A rank has ended, or its connection to the relay has. by_kernel: whether the kernel has killed a process of this
    machine for want of memory since the job began."""

    rank: int
    by_kernel: bool = False


class Leave(Envelope):
    """The client asks the machine to end its ranks; torchrun starts them again. reason: for the machine's log."""

    reason: str


AnyEnvelope = Hello | Welcome | Rejected | Here | Deliver | FromRank | Region | Gone | Leave


def payload_bytes(envelope: Envelope) -> int:
    """The bytes that follow an envelope."""
    if isinstance(envelope, (Deliver, FromRank)):
        return envelope.body + envelope.block
    if isinstance(envelope, Region):
        total = envelope.itemsize
        for size in envelope.sizes:
            total *= size
        return total
    return 0
