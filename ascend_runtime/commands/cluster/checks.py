"""What `doctor` checks of the clusters that have a file on this host: the file, the key, the address to listen at.

Imports nothing that is not there before the pack's requirements are installed.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterator

from ...hardware.host import HostFault
from ..doctor.findings import Finding, error, fine, warning
from ..doctor.surroundings import Surroundings


def _clusters(around: Surroundings) -> Iterator[Finding]:
    try:
        from ...specs import cluster
        from ...wire import tls
    except ImportError:
        yield fine("clusters", "not checked: msgspec is missing")
        return
    names = cluster.cluster_names(around.environ)
    if not names:
        yield fine("clusters", "none; `python -m ascend_runtime cluster new` makes one, for several machines")
    for name in names:
        try:
            found = cluster.read_cluster(name, around.environ)
        except ValueError as failure:
            yield error("clusters", _fault(failure, "Correct it by docs/machines.md, or delete it."))
            continue
        yield fine("clusters", f"{name}: {found.ranks} ranks")
        try:
            tls.read_key(found.key)
            yield fine("clusters' keys", f"{name}: {found.key}, for this user only")
        except ValueError as failure:
            yield error("clusters' keys", _fault(failure, "If it is lost or damaged: copy it from another of "
                         "the machines, or make the cluster again (docs/machines.md)."))
        yield from _address(around, found)


def _address(around: Surroundings, cluster) -> Iterator[Finding]:
    host, port = cluster.address
    check, named = "clusters' addresses", f"The address of the cluster {cluster.name}, {cluster.listen},"
    cure = "Correct listen in the cluster's file; `ip addr` lists this host's addresses."
    try:
        number = around.bind(host, port)
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            yield warning(check, HostFault(
                "AV-1908", f"{named} is in use: by ComfyUI, if it runs with this cluster now.",
                f"If it does not: `ss -ltnp 'sport = :{port}'` shows the program. End it, or choose another port.",
            ))  # fmt: skip
        else:
            why = "is not one of this host" if failure.errno == errno.EADDRNOTAVAIL else f"fails ({failure.strerror})"
            yield error(check, HostFault("AV-1908", f"{named} {why}.", cure))
        return
    if ipaddress.ip_address(number.partition("%")[0]).is_loopback:
        yield warning(check, HostFault(
            "AV-1908", f"{named} leads to {number}, which only this host reaches: no other machine can join.", cure,
        ))  # fmt: skip
    elif cluster.risk is None:
        yield fine(check, f"{cluster.name}: {cluster.listen} is free")
    else:
        yield warning(check, HostFault(
            "AV-1908", f"{named} may be reached by strangers: {cluster.risk}.",
            "Give an address in the private network of the machines, as torch's own ports have no key.",
        ))  # fmt: skip


def _fault(failure: ValueError, cure: str) -> HostFault:
    code, _, text = str(failure).partition(": ")
    return HostFault(code, text, cure)


CLUSTER_CHECKS = (_clusters,)
