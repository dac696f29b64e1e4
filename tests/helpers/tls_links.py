"""Connections over loopback between two ends of TLS, and a relay that records their bytes."""

import os
import select
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress

from ascend_runtime.wire import tls
from ascend_runtime.wire.link import Link

DEADLINE = 20.0  # seconds


def connected() -> tuple[socket.socket, socket.socket]:
    """(the end that has listened, the end that has connected), over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


def established(ours: socket.socket, theirs: socket.socket, key) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Both ends after the handshake; `ours` is the server's."""
    steps = [tls.Handshake(ours, key, server=True), tls.Handshake(theirs, key, server=False)]
    done = [None, None]
    until = time.monotonic() + DEADLINE
    while None in done:
        assert time.monotonic() < until
        for number, handshake in enumerate(steps):
            if done[number] is None and ready(handshake, handshake.events, 0.01):
                done[number] = handshake.step()
    return done[0], done[1]


def ready(end, events: int = select.POLLIN, timeout: float = DEADLINE) -> bool:
    poll = select.poll()
    poll.register(end, events)
    return bool(poll.poll(timeout * 1000))


def links(key, place=None, other_place=None) -> tuple[Link, Link]:
    ours, theirs = established(*connected(), key)
    return Link(ours, place or refuse), Link(theirs, other_place or refuse)


def refuse(envelope):
    raise AssertionError(f"no payload of {type(envelope).__name__} was expected")


def taken(link: Link, *others: Link):
    """The next envelope, while `others` send what they have to."""
    until = time.monotonic() + DEADLINE
    while (envelope := link.take()) is None:
        assert time.monotonic() < until, "nothing has arrived"
        poll = select.poll()
        poll.register(link, select.POLLIN)
        for other in (link, *others):
            other.flush()
            if other.unsent:
                poll.register(other, select.POLLIN | select.POLLOUT)
        if not link.waiting:
            poll.poll(100)
    return envelope


CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


def certificate(folder, name: str, *arguments: str, extensions: str = "basicConstraints=critical,CA:FALSE") -> str:
    """Path of a key file as `openssl` makes one, with further arguments of `openssl req`."""
    config = f"[req]\ndistinguished_name=subject\nx509_extensions=extensions\n[subject]\n[extensions]\n{extensions}\n"
    ran = subprocess.run(
        ["openssl", "req", "-x509", "-subj", f"/CN={name}", "-config", "/dev/stdin",
         *(arguments or ("-nodes", *CURVE))],
        input=config.encode(), capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    return written(folder / f"{name}.key", ran.stdout)


def written(path, content: bytes) -> str:
    path.write_bytes(content)
    os.chmod(path, 0o600)
    return str(path)


class Recorder(threading.Thread):
    """Passes on the bytes between two sockets, and keeps them. sent: by `first`; answered: by `second`."""

    def __init__(self, first: socket.socket, second: socket.socket):
        super().__init__(daemon=True)
        self._ends = first, second
        self.sent, self.answered = bytearray(), bytearray()
        self.start()

    def run(self):
        first, second = self._ends
        with first, second, suppress(OSError):  # an end that is gone
            self._pass_on(first, second)

    def _pass_on(self, first: socket.socket, second: socket.socket):
        ways = {first.fileno(): (first, second, self.sent), second.fileno(): (second, first, self.answered)}
        poll = select.poll()
        for descriptor in ways:
            poll.register(descriptor, select.POLLIN)
        while ways:
            for descriptor, _ in poll.poll(DEADLINE * 1000):
                source, target, record = ways[descriptor]
                data = source.recv(1 << 16)
                record += data
                if data:
                    target.sendall(data)
                else:
                    poll.unregister(descriptor)
                    del ways[descriptor]
                    target.shutdown(socket.SHUT_WR)
