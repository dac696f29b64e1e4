"""The network interface through which this host reaches another one. Does not import torch."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

from ..errors import coded_error

# Gloo takes a name. NCCL and HCCL take the beginning of names, or with "=" a whole name (NCCL's and CANN's pages of
# these variables).
SOCKET_INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}", "HCCL_SOCKET_IFNAME": "={}"}


def interfaces_towards(host: str, machines: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of SOCKET_INTERFACES that the user has not set, with the interface that leads to `host`, the first
    of `machines` machines. Raises ValueError if there is none, or only this host could use it."""
    unset = [name for name in SOCKET_INTERFACES if not environ.get(name)]
    if not unset:
        return {}
    source = source_towards(host)
    if machines > 1 and source.is_loopback and not _is_literally_loopback(host):
        raise coded_error(
            "AV-1912",
            f"This host's name, {host}, leads to {source}, which other machines do not reach. Give torchrun "
            "`--local-addr` with this host's address in the cluster's network.",
        )
    interface = interface_with(source)
    return {name: SOCKET_INTERFACES[name].format(interface) for name in unset}


def source_towards(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """This host's address on the way to another host. Sends nothing. Raises ValueError if there is no way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: the kernel only looks for a route
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError as error:
        raise coded_error(
            "AV-1912",
            f"This host does not reach {host}, where the first of the machines is ({error}). Check the network, and "
            "that each machine knows the others' names; or give torchrun `--local-addr` with an address there.",
        ) from None


def interface_with(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """The name of the interface that has this address. Raises ValueError if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == str(address) for entry in entries):
            return name
    if address.is_loopback:
        return "lo"  # Linux answers to all of 127.0.0.0/8 there, and lists one address
    raise coded_error(
        "AV-1912",
        f"No interface of this host has the address {address}. Set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME or "
        "HCCL_SOCKET_IFNAME, to the interface in the cluster's network.",
    )


def _is_literally_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
