"""Strangers at a cluster's address, while jobs of played machines run: they are refused, cost little, change nothing.

60 connections; 1,000 with --all-machines.
"""

import logging
import os
import select
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest
from ascend_runtime import Cluster, Runtime
from ascend_runtime.client.machines import listener
from ascend_runtime.wire.envelopes import PROTOCOL, Hello, Leave
from ascend_runtime.wire.link import Link, LinkClosed
from ascend_runtime.wire.tls import Handshake, make_key, read_key
from played_machines import PlayedMachine, free_port, until
from rank_processes import resident_mb

GROWTH = 60  # MB


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        make_key(folder / f"{name}.key", name)
    return folder / "ours.key", folder / "theirs.key"


@pytest.fixture
def cluster(keys):
    return Cluster(name="played", listen=f"127.0.0.1:{free_port()}", key=str(keys[0]), ranks=1)


@pytest.fixture
def working(cluster):
    """A Runtime whose played machine takes its time for each job, and the machine."""

    def answer(machine, deliver, message):
        time.sleep(0.002)
        machine.done(deliver)

    with PlayedMachine(cluster, "atlas1", (0,), answer=answer) as machine, Runtime(cluster=cluster) as runtime:
        runtime.ping()
        yield runtime, machine


def plain(cluster, data=b""):
    connection = socket.create_connection(cluster.address)
    connection.sendall(data)
    return connection


def with_tls(cluster, key=None):
    """Without a certificate, or with that of another key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if key is not None:
        context.load_cert_chain(key)
    connection = plain(cluster)
    connection.settimeout(10)
    try:
        return context.wrap_socket(connection)
    except OSError:
        return connection


def is_refused(connection, seconds=10):
    """Whether the client closes a connection, and says nothing else than why by TLS."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass  # an alert, or a reset
    finally:
        connection.close()
    return True


def test_strangers_change_nothing(working, cluster, keys, request, caplog, monkeypatch):
    monkeypatch.setattr(listener, "DEADLINE", 1.0)
    runtime, machine = working
    count = 1000 if request.config.getoption("--all-machines") else 60
    silent, kinds = [], [
        lambda: silent.append(plain(cluster)),
        lambda: silent.append(plain(cluster, b"\x16")),  # the first byte of TLS
        lambda: plain(cluster, b"GET / HTTP/1.1\r\n\r\n"),
        lambda: plain(cluster, os.urandom(500)),
        lambda: plain(cluster).close(),
        lambda: with_tls(cluster),
        lambda: with_tls(cluster, keys[1]),
    ]  # fmt: skip
    memory, connections = resident_mb(os.getpid()), []
    with caplog.at_level(logging.INFO):
        strangers = threading.Thread(
            target=lambda: connections.extend(kinds[number % len(kinds)]() for number in range(count)), daemon=True
        )
        strangers.start()
        jobs = 0
        while strangers.is_alive():
            runtime.ping()
            jobs += 1
    strangers.join()
    assert jobs > 10 and machine.welcomes == 1 and not machine.seen_of(Leave)
    assert all(is_refused(connection) for connection in (*silent, *filter(None, connections)))
    assert resident_mb(os.getpid()) - memory < GROWTH
    lines = [record.getMessage() for record in caplog.records if "was refused" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("A connection from 127.0.0.1 to the cluster played was refused")
    secret = Path(keys[0]).read_text().splitlines()[1]
    assert secret not in caplog.text
    runtime.ping()


def test_few_wait_at_a_time_and_the_oldest_goes_first(working, cluster):
    strangers = [plain(cluster) for _ in range(listener.MOST_PENDING + 6)]
    until(lambda: sum(map(is_over, strangers)) == 6)
    assert list(map(is_over, strangers)) == [True] * 6 + [False] * listener.MOST_PENDING
    for stranger in strangers:
        stranger.close()


def is_over(connection):
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def test_a_crowd_at_one_address_does_not_displace_another():
    crowd = [listener._Newcomer(socket.socket(), "10.0.0.1") for _ in range(3)]
    machine = listener._Newcomer(socket.socket(), "10.0.0.2")

    class Waiting:
        _pending = [machine, *crowd]

    assert listener.Listener._least_wanted(Waiting) is crowd[0]
    silent = listener.Listener._in_turn(Waiting, [*crowd, machine])
    assert silent == [machine, crowd[0]]
    for newcomer in (*crowd, machine):
        newcomer.close()


@pytest.mark.parametrize("begins", [b"", b"\x16\x03\x01"], ids=["silent", "begins TLS"])
def test_who_says_nothing_is_dropped(cluster, keys, monkeypatch, begins):
    monkeypatch.setattr(listener, "DEADLINE", 0.2)
    with PlayedMachine(cluster, "atlas1", (0,)), Runtime(cluster=cluster) as runtime:
        runtime.ping()
        assert is_refused(plain(cluster, begins), 2)


def test_who_has_the_key_must_say_hello(cluster, keys, monkeypatch):
    monkeypatch.setattr(listener, "DEADLINE", 0.5)
    with PlayedMachine(cluster, "atlas1", (0,)), Runtime(cluster=cluster) as runtime:
        runtime.ping()
        for says in (None, Leave(reason="x"), b"GET / HTTP/1.1\r\n\r\n"):
            link = Link(established(cluster, keys[0]), lambda envelope: None)
            if isinstance(says, bytes):
                link._socket.send(says)
            elif says is not None:
                link.post(says)
            with pytest.raises(LinkClosed):
                while True:
                    link.take()
                    time.sleep(0.005)
        runtime.ping()


def test_a_hello_in_many_pieces_is_refused(cluster, keys):
    with PlayedMachine(cluster, "atlas1", (0,)), Runtime(cluster=cluster) as runtime:
        runtime.ping()
        link = Link(established(cluster, keys[0]), lambda envelope: None)
        sent = []
        link._unsent = _Collected(sent)
        link.post(Hello(pack="x" * 900, protocol=PROTOCOL))
        with pytest.raises((LinkClosed, OSError)):
            for byte in b"".join(sent):
                link._socket.send(bytes([byte]))
                time.sleep(0.006)
                link.take()
        runtime.ping()


class _Collected:
    def __init__(self, parts):
        self._parts = parts

    def append(self, part):
        self._parts.append(bytes(part))

    def __bool__(self):
        return False

    def clear(self):
        pass


def established(cluster, key):
    handshake = Handshake(plain(cluster), read_key(key), server=False)
    while (sock := handshake.step()) is None:
        time.sleep(0.002)
    return sock


def test_a_line_a_minute_for_an_address_and_few_in_all(caplog, monkeypatch):
    complaints = listener._Complaints("played")
    with caplog.at_level(logging.WARNING):
        for number in range(50):
            for _ in range(3):
                complaints.say(f"10.0.0.{number}", "it has no key")
    assert len(caplog.records) == listener.MOST_LINES
    monkeypatch.setattr(listener, "MINUTE", 0.0)
    complaints.say("10.0.0.1", "it has no key")
    assert len(caplog.records) == listener.MOST_LINES + 1
