"""What a machine's first rank gives its relay, and how the machine's ranks find it."""

from __future__ import annotations

import os
import socket
import struct

from msgspec import Struct

LONGEST_PAUSE = 30.0  # seconds
_CREDENTIALS = struct.Struct("3i")  # unix(7): process, user, group


class RelaySettings(Struct, kw_only=True):
    """client: HOST:PORT. key: the path of the key file. wait: seconds without a client until the ranks end; 0: for
    ever. first, ranks: the machine's ranks are `ranks` ones from number `first` on. listener: the descriptor of the
    socket that they connect to. parent: the process of the first one. restart: how often torchrun has started them
    again."""

    client: str
    key: str
    machine: str
    wait: float
    device: str
    first: int
    ranks: int
    world_size: int
    listener: int
    parent: int
    restart: int = 0


class Arrival(Struct, kw_only=True):
    """A rank's first words to its relay."""

    rank: int


def name_of_socket(parent: int, restart: int) -> str:
    """The abstract name of the socket of a relay, unique among those of one network namespace. parent: torchrun's
    process. restart: see `RelaySettings`."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"\0ascend-video/{os.getuid()}/{namespace}/{parent}/{restart}"


def pause_before_failing(restart: int) -> float:
    """Seconds to wait before ranks end for a reason that may still be there when torchrun starts them again, as it does
    at once, and many times."""
    return min(2.0**restart, LONGEST_PAUSE) if restart else 0.0


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(process, user) at the other end of a local connection: of who connected, or who opened the listening socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(data)
    return process, user
