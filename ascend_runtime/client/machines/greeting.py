"""Whether a machine fits the cluster: what it says of itself in its Hello, compared with the client and the other
machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...errors import coded
from ...hardware.devices import DEVICE_KINDS
from ...hardware.versions import OWN_NAME, versions
from ...specs.cluster import Cluster, require_name
from ...wire.envelopes import PROTOCOL, Hello, Rejected
from ..rank_words import ranks_in_words
from .machine import RelayLink

AGAIN = "then start its ranks again"


def rejection(hello: Hello, cluster: Cluster, others: Sequence[RelayLink]) -> Rejected | None:
    """Why a machine cannot join; None if it can. others: machines that have joined."""
    lasting = next(_lasting(hello, cluster, others), None)
    if lasting is not None:
        return Rejected(reason=lasting)
    passing = next(_passing(hello, others), None)
    return passing and Rejected(reason=passing, lasting=False)


def _lasting(hello: Hello, cluster: Cluster, others: Sequence[RelayLink]) -> Iterator[str]:
    yield from _versions(hello)
    try:
        require_name(hello.machine, "--machine")
    except ValueError as error:
        yield coded("AV-1904", str(error))
        return
    yield from _numbers(hello, cluster)
    if hello.device not in DEVICE_KINDS or hello.device == "auto":
        yield coded("AV-1904", f"The device of {_named(hello)} is {hello.device[:80]!r}, which is not known.")
    for other in others:
        if other.device != hello.device:
            yield coded(
                "AV-1904",
                f"{_capital(_named(hello))} has the device {hello.device!r}, and {other.name!r} has {other.device!r}; "
                f"the ranks of a cluster must all have the same. Set --device on each machine, {AGAIN}.",
            )
        yield from _packages(hello, other)


def _versions(hello: Hello) -> Iterator[str]:
    own = versions()[OWN_NAME]
    if hello.pack != own:
        yield coded(
            "AV-1903",
            f"{_capital(_named(hello))} has Ascend Video {hello.pack[:80]!r}, and the client {own!r}. Install the same "
            f"release on both, {AGAIN}.",
        )
    elif hello.protocol != PROTOCOL:
        yield coded(
            "AV-1903",
            f"{_capital(_named(hello))} speaks version {hello.protocol} of the protocol, and the client {PROTOCOL}, "
            f"though both are of release {own}. Install the same files on both, {AGAIN}.",
        )


def _numbers(hello: Hello, cluster: Cluster) -> Iterator[str]:
    if hello.world_size != cluster.ranks:
        yield coded(
            "AV-1904",
            f"The ranks of {_named(hello)} were started as part of {hello.world_size}, and the file of the cluster "
            f"{cluster.name!r} has \"ranks\": {cluster.ranks}. Correct --nnodes and --nproc-per-node of torchrun, or "
            "the file.",
        )
    ranks = set(hello.ranks)
    if not ranks or len(ranks) != len(hello.ranks) or not ranks <= set(range(cluster.ranks)):
        yield coded(
            "AV-1904",
            f"{_capital(_named(hello))} reports the ranks {str(hello.ranks)[:80]}; they must be different numbers from "
            f"0 to {cluster.ranks - 1}.",
        )


def _packages(hello: Hello, other: RelayLink) -> Iterator[str]:
    theirs = other.hello.packages
    for name in sorted({*hello.packages, *theirs}):
        one, two = hello.packages.get(name, "not installed"), theirs.get(name, "not installed")
        if _release(one) != _release(two):
            yield coded(
                "AV-1903",
                f"{_capital(_named(hello))} has another {name[:80]} ({one[:80]}) than {other.name!r} ({two}). Install "
                f"the same version on all machines, {AGAIN}.",
            )


def _passing(hello: Hello, others: Sequence[RelayLink]) -> Iterator[str]:
    """What may be over soon, as when a machine comes again before the loss of its last connection is noticed."""
    for other in others:
        if other.name == hello.machine:
            yield coded(
                "AV-1904",
                f"A machine {other.name!r} is connected already, with {ranks_in_words(other.ranks)}. If it is another "
                "one, give each its own name by --machine.",
            )
        if shared := set(other.ranks) & set(hello.ranks):
            yield coded(
                "AV-1904",
                f"{_capital(_named(hello))} has {ranks_in_words(shared)}, as {other.name!r} does. Start torchrun once "
                "on each machine, with the same --rdzv-endpoint; two such groups cannot have one key.",
            )


def _release(version: str) -> str:
    """Without what distinguishes builds of a release, such as +cpu, which differs between processors."""
    return version.partition("+")[0]


def _named(hello: Hello) -> str:
    return f"the machine {hello.machine[:80]!r}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
