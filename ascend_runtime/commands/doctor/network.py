"""Checks of the ports and network interfaces through which NPUs' ranks find each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...hardware.host import HostFault
from .findings import Finding, error, fine, warning
from .surroundings import Surroundings

_FIRST_PORT, _PORTS = 60000, 32  # HCCL's own, unless HCCL_IF_BASE_PORT or a range is set
_UP = 1  # IFF_UP of a network interface's flags (linux/if.h)
_DOWN = ("down", "lowerlayerdown", "notpresent", "dormant")  # of operstate (the kernel's operstates document)
_MOST_LINES = 200_000  # of /proc/net/tcp: one a connection


def _ports(around: Surroundings) -> Iterator[Finding]:
    """Whether other programs use HCCL's ports. With HCCL_HOST_SOCKET_PORT_RANGE=auto, the default here, a CANN that
    knows it takes free ones."""
    base = around.environ.get("HCCL_IF_BASE_PORT", "")
    first = int(base) if base.isdigit() and len(base) <= 5 else _FIRST_PORT
    listed = around.environ.get("HCCL_HOST_SOCKET_PORT_RANGE", "auto")
    wanted = _ports_of(listed) if not base and listed != "auto" else set(range(first, first + _PORTS))
    busy = sorted(wanted & _used_ports(around))
    if not busy:
        yield fine("HCCL's ports", f"{min(wanted, default=first)} to {max(wanted, default=first)} are free")
        return
    fixed = bool(base) or listed != "auto"
    yield (error if fixed else warning)("HCCL's ports", HostFault(
        "AV-1101", f"Other programs use HCCL's port(s) {', '.join(map(str, busy[:8]))}.",
        "Leave HCCL_IF_BASE_PORT unset and HCCL_HOST_SOCKET_PORT_RANGE at auto. If CANN does not support the latter, "
        f"run `sysctl -w net.ipv4.ip_local_reserved_ports={first}-{first + _PORTS - 1}`, and end those programs.",
    ))  # fmt: skip


def _ports_of(text: str) -> set[int]:
    """The ports of HCCL_HOST_SOCKET_PORT_RANGE; none if its value is invalid, which is another check's fault."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first) <= 65535:
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _used_ports(around: Surroundings) -> set[int]:
    """The local TCP ports in use: of listeners and of connections (proc_net(5)). A closed connection that waits for
    late packets (state 06) does not keep its port from a listener."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            with (around.proc / "net" / name).open() as file:
                rows = [line.split(maxsplit=4)[:4] for _, line in zip(range(_MOST_LINES), file)][1:]
        except OSError:
            continue
        found |= {int(row[1].rpartition(":")[2], 16) for row in rows if len(row) == 4 and row[3] != "06"}
    return found


def _interfaces(around: Surroundings) -> Iterator[Finding]:
    """Whether HCCL_SOCKET_IFNAME names interfaces that are up. HCCL: "=a,b" exact names, "^" excludes, else prefixes.
    """
    there = {folder.name: _is_up(folder) for folder in sorted((around.root / "sys/class/net").glob("*"))}
    text = around.environ.get("HCCL_SOCKET_IFNAME", "")
    chosen = [name for name in there if _matches(name, text)]
    if not text:
        yield fine("interfaces", f"HCCL chooses among {', '.join(name for name, up in there.items() if up) or 'none'}")
    elif any(there[name] for name in chosen):
        yield fine("interfaces", f"HCCL_SOCKET_IFNAME={text}: {', '.join(name for name in chosen if there[name])}")
    else:
        state = f"{', '.join(chosen)} is down" if chosen else "there is no such interface"
        up = ", ".join(name for name, is_up in there.items() if is_up)
        yield error("interfaces", HostFault(
            "AV-1104", f"HCCL_SOCKET_IFNAME is {text!r}, but {state}.",
            f"Unset it, or name one of these that are up: {up or 'none'} (`ip link`).",
        ))  # fmt: skip


def _matches(name: str, text: str) -> bool:
    exclude, text = text.startswith("^"), text.removeprefix("^")
    exact, names = text.startswith("="), text.removeprefix("=").split(",")
    return exclude != any(name == one if exact else bool(one) and name.startswith(one) for one in names)


def _is_up(folder: Path) -> bool:
    try:
        return bool(int((folder / "flags").read_text(), 16) & _UP) and (
            (folder / "operstate").read_text().strip() not in _DOWN
        )
    except (OSError, ValueError):
        return False  # it is being removed, or is a file of the bonding driver


NETWORK_CHECKS = (_ports, _interfaces)
