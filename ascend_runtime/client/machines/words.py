"""What is said of a cluster's ranks: how many have joined, which are missing, how to start them."""

from __future__ import annotations

from collections.abc import Sequence

from ...specs.cluster import Cluster
from ..rank_words import ranks_in_words
from .machine import RelayLink


def waiting_text(cluster: Cluster, machines: Sequence[RelayLink]) -> str:
    """How far the ranks have come, while a job waits for them."""
    here = {rank for machine in machines for rank in machine.here}
    joined = f"{len(here)} of {cluster.ranks} ranks have joined"
    if len(here) == cluster.ranks:
        return f"{joined}; waiting until they have found each other."
    missing = set(range(cluster.ranks)) - here
    if not machines:
        return f"{joined}; waiting for the machines of the cluster {cluster.name!r} at {cluster.listen}."
    return f"{joined}; waiting for {ranks_in_words(missing)}. {_present(machines)}"


def late_text(cluster: Cluster, machines: Sequence[RelayLink], seconds: float) -> str:
    """Why a job could not begin."""
    missing = set(range(cluster.ranks)).difference(*(machine.here for machine in machines))
    if missing:
        joined = f"{cluster.ranks - len(missing)} of the {cluster.ranks} ranks of the cluster {cluster.name!r}"
        lack = f"Only {joined} have joined within {seconds:.0f} s; missing: {ranks_in_words(missing)}."
    else:
        lack = f"The ranks of the cluster {cluster.name!r} have not found each other within {seconds:.0f} s."
    present = _present(machines) if machines else f"No machine has come to {cluster.listen}."
    return (
        f"{lack} {present} See torchrun's output on the other machines, or start the ranks on "
        f"each machine: `python -m ascend_runtime cluster show {cluster.name}` prints the commands. Set "
        "ASCEND_RUNTIME_START_DEADLINE to wait longer."
    )


def _present(machines: Sequence[RelayLink]) -> str:
    each = [f"{machine.name} ({ranks_in_words(machine.here) if machine.here else 'none yet'})" for machine in machines]
    return f"Joined: {', '.join(each)}."
