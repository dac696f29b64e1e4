"""Who is not of the cluster, at the address where the client listens: refused, and of no influence on a running job.

What was sent between the hosts shows neither a prompt nor a tensor.
"""

import os
import signal
import socket
import ssl
import threading
import time

import pytest
import torch
from ascend_runtime import ParallelSpec, SampleSpec
from ascend_runtime.hardware.versions import OWN_NAME, package_versions, versions
from ascend_runtime.wire.envelopes import PROTOCOL, Hello, Rejected
from ascend_runtime.wire.link import Link
from ascend_runtime.wire.tls import make_key, read_key
from cluster_ranks import PORT
from rank_processes import seconds_until
from torch.testing import assert_close

PROMPT = "a red ball moves left to right"
SHAPE = (1, 16, 5, 8, 8)
REFUSED = 20.0  # seconds until a stranger is refused, at most


@pytest.fixture(scope="module")
def pair(pairs):
    return pairs(1)


@pytest.fixture(scope="module")
def slow_specs(specs_of, checkpoints):
    return specs_of(checkpoints(layers=24, text_layers=24))


def job(runtime, specs, steps=4):
    spec = SampleSpec(seed=3, steps=steps, guidance_scale=3.0)
    parallel = ParallelSpec(ranks=runtime.world_size)
    return runtime.sample(
        specs.model, spec, torch.zeros(SHAPE), specs.text(1), specs.text(2), parallel=parallel
    ).tensor  # fmt: skip


@pytest.fixture(scope="module")
def expected(one_rank, slow_specs):
    return job(one_rank, slow_specs)


def connected(pair):
    """A TCP connection to the client from another host."""
    with pair.between.entered():
        return socket.create_connection((pair.hosts[0].address, PORT), timeout=REFUSED)


@pytest.fixture
def stranger(pair):
    """`stranger()`: such a connection."""
    made = []

    def connect():
        made.append(connected(pair))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


@pytest.fixture(scope="module", autouse=True)
def silent(pair):
    """Connections that send nothing, and the beginning of a handshake. They have a deadline, which passes while other
    tests run."""
    made = [connected(pair), connected(pair)]
    made[1].sendall(b"\x16\x03\x01\x00\x10ASL1")
    yield made
    for connection in made:
        connection.close()


def said_to(connection):
    """What comes before the end of a connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionError:
        pass
    return received


def assert_undisturbed(pair):
    assert pair.client.alive
    assert torch.equal(pair.client.ping(torch.ones(10), 5).tensor, torch.ones(5))


# One of them


def test_those_who_do_not_speak_tls(pair, stranger):
    texts = [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 300]
    connections = [stranger() for _ in texts]
    for connection, text in zip(connections, texts):
        connection.sendall(text)
    for connection in connections:
        assert len(said_to(connection)) <= 16  # an alert of TLS at most
    assert_undisturbed(pair)


def handshake(context, connection):
    """A TLS connection; if the client refuses only after the handshake, it shows with the first read."""
    with context.wrap_socket(connection) as secure:
        secure.sendall(b"hello")
        return secure.recv(100)


def test_one_without_a_key(pair, stranger):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        assert handshake(context, stranger()) == b""
        raise ConnectionError
    assert_undisturbed(pair)


def test_one_with_another_key(pair, stranger, tmp_path):
    make_key(tmp_path / "other.key", "two_hosts")
    key = read_key(tmp_path / "other.key")
    with pytest.raises(ssl.SSLError, match="(?i)verify"):  # it does not accept the client either
        handshake(key.context(server=False), stranger())
    context = key.context(server=False)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        assert handshake(context, stranger()) == b""
        raise ConnectionError
    assert_undisturbed(pair)


def test_an_older_tls(pair, stranger):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(context, stranger())
    assert_undisturbed(pair)


def answer_to(pair, stranger, **hello):
    """What the client answers to a machine's Hello, with the right key."""
    key = read_key(pair.ranks.key)
    link = Link(key.context(server=False).wrap_socket(stranger()), lambda envelope: None)
    given = {"pack": versions()[OWN_NAME], "protocol": PROTOCOL, "machine": "host9", "ranks": (0,), "world_size": 2,
             "device": "cpu", "packages": package_versions()}  # fmt: skip
    link.post(Hello(**{**given, **hello}))
    answers = []
    seconds_until(lambda: answers.append(link.take()) or answers[-1] is not None, REFUSED)
    link.close()
    return answers[-1]


@pytest.mark.parametrize("hello, reason", [
    ({"pack": "0.0.9"}, "0.0.9"),
    ({"protocol": PROTOCOL + 1}, "."),
    ({"world_size": 3, "ranks": (2,)}, "3"),
    ({"ranks": (0,)}, "host1"),
], ids=["another pack", "another protocol", "another size", "the rank of another"])  # fmt: skip
def test_a_machine_that_does_not_fit(pair, stranger, hello, reason):
    answer = answer_to(pair, stranger, **hello)
    assert isinstance(answer, Rejected) and reason in answer.reason, answer
    assert_undisturbed(pair)


def test_recorded_bytes_sent_again(pair, stranger):
    """All that host2 has sent to the client, to the letter."""
    files = sorted(pair.recorded.glob("*-to"), key=lambda file: file.stat().st_size)
    recorded = files[-1].read_bytes()
    assert len(recorded) > 1000
    connection = stranger()
    try:
        connection.sendall(recorded[:1_000_000])
    except ConnectionError:
        pass  # it has closed it already
    answered = said_to(connection)
    assert len(answered) < 8000  # its side of a handshake, which it does for everyone
    assert_undisturbed(pair)


# Many of them


def hold(connections, connect):
    connections.append(connect())


def close(connections, connect):
    connect().close()


def begin_tls(connections, connect):
    """Sends the beginning of a handshake, and then nothing."""
    connections.append(connect())
    connections[-1].sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


class Crowd(threading.Thread):
    """1,000 connections from another host, each treated alike."""

    def __init__(self, pair, way, number=1000):
        super().__init__(daemon=True)
        self._pair, self._way, self.number = pair, way, number
        self.connections, self.came = [], 0
        self.start()

    def run(self):
        with self._pair.between.entered():
            while self.came < self.number:
                try:
                    self._way(self.connections, self._connect)
                    del self.connections[:-1000]
                except OSError:
                    pass  # refused
                self.came += 1

    def _connect(self):
        return socket.create_connection((self._pair.hosts[0].address, PORT), timeout=REFUSED)

    def disperse(self):
        self.join(300)
        for connection in self.connections:
            connection.close()


WAYS = (hold, close, begin_tls)


@pytest.mark.timeout(600)
def test_1000_connections_during_a_job(request, rng, pair, slow_specs, expected):
    job(pair.client, slow_specs)
    began = time.monotonic()
    job(pair.client, slow_specs)
    usual = time.monotonic() - began
    for way in WAYS if request.config.getoption("--all-machines") else [rng.choice(WAYS)]:
        crowd = Crowd(pair, way)
        longest = 0.0
        while crowd.is_alive():
            began = time.monotonic()
            latent = job(pair.client, slow_specs)
            longest = max(longest, time.monotonic() - began)
            assert_close(latent, expected, atol=1e-4, rtol=0.0)
        crowd.disperse()
        print(f"{way.__name__}: {longest:.1f} s, usually {usual:.1f} s")
        assert crowd.came == 1000 and 0 < longest < 4 * usual + 3
        assert_undisturbed(pair)


def test_machines_join_despite_a_crowd(request, pair, slow_specs, expected):
    """Whose connections come all the time, and stay."""
    if not request.config.getoption("--all-machines"):
        pytest.skip("only with --all-machines")
    for way in WAYS:
        crowd = Crowd(pair, way, 20_000)
        os.kill(next(iter(pair.ranks.ranks(pair.hosts[1]).values())), signal.SIGKILL)
        seconds_until(lambda: not pair.client.alive, 10)
        latent = job(pair.client, slow_specs)
        print(f"{crowd.came} came")
        crowd.number = 0
        crowd.disperse()
        assert_close(latent, expected, atol=1e-4, rtol=0.0)


def test_those_who_do_not_go_on(pair, silent):
    for connection in silent:
        assert said_to(connection) == b""
    assert_undisturbed(pair)


# What is seen on the wire


def test_nothing_readable_was_sent(pair, specs):
    """The marks of a prompt, of a latent and of frames in the connection of host2, both ways."""
    before = {file.name: file.stat().st_size for file in pair.recorded.iterdir()}
    latent = torch.full((1, 16, 2, 8, 8), 0.1234567)
    frames = pair.client.decode(specs.vae, latent).tensor
    pair.client.encode(specs.encoder, PROMPT)
    pair.client.ping(latent, 100)
    sent = b"".join(file.read_bytes()[before.get(file.name, 0) :] for file in pair.recorded.iterdir())
    assert len(sent) > latent.nbytes + frames.nbytes // 2
    marks = [PROMPT.encode(), b"red ball", latent.numpy().tobytes()[:16], torch.ones(4).numpy().tobytes(),
             frames[0, :1, :4].numpy().tobytes(), b"Deliver", b"FromRank", b"PRIVATE",
             str(specs.folder).encode()]  # fmt: skip
    assert not [mark for mark in marks if mark in sent]
