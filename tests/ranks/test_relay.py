"""A machine's relay: between a client and ranks that play, so that what they do is certain, and torch is not needed."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import played_rank
import psutil
import pytest
from ascend_runtime.engine.machine.relay import ranks
from ascend_runtime.engine.machine.relay.ranks import LocalRank, may_connect
from ascend_runtime.engine.machine.relay.settings import name_of_socket
from ascend_runtime.wire.envelopes import FromRank, Gone, Leave, Region, Rejected
from ascend_runtime.hardware.processes import start_of
from ascend_runtime.wire.link import LinkClosed
from ascend_runtime.wire.packets import Packets
from ascend_runtime.wire.tls import make_key
from machines_client import MachinesClient

SECRET = "a cat on a mat in /models/secret"


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "cluster.key"
    make_key(file, "cluster")
    return file


@pytest.fixture
def client(key):
    with MachinesClient(key) as client:
        yield client


@pytest.fixture
def start():
    """`start(client, ranks=1, ...)`: ranks of one machine, and what they and their relay print; ended afterwards."""
    started = []

    def ranks(client, ranks=1, key=None, **options):
        machine = PlayedMachine([
            played_rank.start(client.address, key or client.key_file, rank, ranks, **options)
            for rank in range(ranks)
        ])  # fmt: skip
        started.append(machine)
        return machine

    yield ranks
    for machine in started:
        machine.end()


class PlayedMachine:
    def __init__(self, processes):
        self.processes = processes
        self._output = None

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()

    @property
    def codes(self):
        """The ranks' exit codes, when all have ended."""
        return [process.wait(30) for process in self.processes]

    @property
    def output(self):
        """Of the ranks and the relay, when all have ended. The first rank's output is also the relay's."""
        if self._output is None:
            self.end()
            self._output = "".join(process.stdout.read() for process in self.processes)
        return self._output

    @property
    def relay(self):
        first = psutil.Process(self.processes[0].pid)
        return next(one for one in first.children() if "ascend_runtime.engine.machine.relay" in one.cmdline())


def play(job, **what):
    return {"type": "Play", "job": job, **what}


def test_messages_and_results_pass_between_client_and_ranks(client, start):
    machine = start(client, ranks=2, first=2, world_size=4, machine="atlas1")
    link = client.accept()
    assert (link.hello.machine, link.hello.ranks, link.hello.world_size) == ("atlas1", (2, 3), 4)
    assert link.hello.device == "cpu" and "torch" in link.hello.packages
    assert link.ready([2, 3]) == {"played"}
    link.say([2, 3], play(1, do="fill", shape=[4, 1000], text=SECRET), job=1, block=b"tensors", lent=[4000])
    assert {answer["got"] for answer in link.answers([2, 3]).values()} == {b"tensors"}
    assert bytes(link.lent[0]) == bytes(2000) + b"\3" * 1000 + b"\4" * 1000
    link.say([3], play(2, do="answer"), job=2)
    assert set(link.answers([3])) == {3}
    assert not Path(f"/proc/{machine.relay.pid}/maps").read_text().count("libtorch")
    assert SECRET not in machine.output and "cat" not in machine.output


def test_ranks_wait_for_the_next_client_when_one_is_gone(client, start, key):
    machine = start(client)
    first = client.accept()
    first.ready([0])
    first.link.close()  # no job runs
    second = client.accept()
    second.ready([0])
    second.say([0], play(7, do="wait"), job=7)
    time.sleep(0.05)
    second.link.close()  # the rank answers a Cancel, which nobody gets to see
    third = client.accept()
    third.ready([0])
    third.say([0], play(1, do="answer"), job=1)
    assert third.answers([0])[0]["job"] == 1
    assert machine.processes[0].poll() is None


def test_a_dead_rank_is_reported_and_also_the_first_one(client, start):
    machine = start(client, ranks=2)
    link = client.accept()
    link.ready([0, 1])
    link.say([0, 1], play(1, do="hang"), job=1)
    time.sleep(0.05)
    for rank in (1, 0):
        machine.processes[rank].kill()
        gone = link.take()
        assert isinstance(gone, Gone) and gone.rank == rank and not gone.by_kernel
    with pytest.raises(LinkClosed):  # the relay ends with its first rank
        link.take(10)


def test_a_client_can_end_the_ranks_although_they_hang(client, start):
    machine = start(client, ranks=2)
    link = client.accept()
    link.ready([0, 1])
    link.say([0, 1], play(1, do="hang"), job=1)
    relay = machine.relay
    link.link.post(Leave(reason="a machine was lost"))
    assert machine.codes == [-signal.SIGKILL] * 2  # which torchrun takes for a failure, and starts them again
    psutil.wait_procs([relay], timeout=10)
    assert not relay.is_running() or relay.status() == psutil.STATUS_ZOMBIE
    assert "a machine was lost" in machine.output


def test_a_new_start_finds_its_own_relay_though_another_is_ending(client, start):
    """torchrun counts no restart when it starts ranks again because a machine has come back."""
    machine = start(client)
    client.accept().ready([0])
    machine.end()
    start(client)
    client.accept().ready([0])


def test_ranks_end_quietly_when_no_client_comes(client, start):
    client.listener.close()
    machine = start(client, ranks=2, wait=0.2)
    assert machine.codes == [0, 0] and "AV-1910" in machine.output


def test_a_refusal_for_now_is_followed_by_another_attempt_and_a_lasting_one_by_the_end(key, start):
    with MachinesClient(key, answer=Rejected(reason="AV-1904: It is connected already.", lasting=False)) as client:
        machine = start(client, ranks=2)
        client.accept()
        client.answer = Rejected(reason="AV-1903: This machine has Ascend Video 0.1.")
        client.accept()
        assert machine.codes == [1, 1]
    assert machine.output.count("AV-1903") == 1
    assert "cannot take this machine now: AV-1904: It is connected already." in machine.output
    assert "key file" not in machine.output


def test_another_key_is_named_and_ranks_wait_for_the_right_one(client, start, tmp_path):
    other = tmp_path / "other.key"
    make_key(other, "other")
    machine = start(client, key=other)
    for _ in range(2):
        with pytest.raises((ValueError, OSError, LinkClosed)):
            client.accept()
    assert machine.processes[0].poll() is None
    assert machine.output.count("AV-1909") == 1 and "BEGIN" not in machine.output


def test_a_key_that_others_can_read_ends_the_ranks(client, start, key, tmp_path):
    shown = tmp_path / "shown.key"
    shown.write_bytes(key.read_bytes())
    shown.chmod(0o644)
    machine = start(client, key=shown)
    assert machine.codes == [1] and "AV-1902" in machine.output and "chmod 600" in machine.output


def test_a_client_that_does_not_read_stops_the_ranks_and_not_the_relays_memory(client, start):
    rows, times = 2048, 60  # of 2 MB each, gathered from every row of the memory
    machine = start(client)
    link = client.accept()
    link.ready([0])
    relay, before = machine.relay, machine.relay.memory_info().rss
    link.say([0], play(1, do="flood", shape=[rows, 2048], times=times), job=1, lent=[rows * 2048])
    most, until = 0, time.monotonic() + 10
    while most < 60e6 and time.monotonic() < until:
        most = max(most, relay.memory_info().rss - before)
        time.sleep(0.02)
    until = time.monotonic() + 0.4  # whether it grows further
    while time.monotonic() < until:
        most = max(most, relay.memory_info().rss - before)
        time.sleep(0.02)
    assert 60e6 < most < 100e6
    parts = 0
    while not (isinstance(envelope := link.take(), FromRank) and link.message["type"] == "Done"):
        parts += isinstance(envelope, Region)
    assert parts == times


def test_strangers_at_the_local_socket_are_turned_away(client, start):
    machine = start(client, ranks=2, restart=9)
    link = client.accept()
    name = name_of_socket(os.getpid(), 9)
    for words in (b"", b"x" * 4096):
        with socket.socket(socket.AF_UNIX) as stranger:
            try:
                stranger.connect(name)
                stranger.sendall(words)
            except ConnectionRefusedError:
                pass  # all ranks have come, and nobody else may
    link.ready([0, 1])
    assert may_connect(os.getuid()) and not may_connect(os.getuid() + 1)
    assert len(re.findall("has connected", machine.output)) == 2


def test_a_process_that_has_the_number_of_a_rank_that_ended_is_not_killed(monkeypatch):
    mine, theirs = socket.socketpair()
    with mine, theirs, subprocess.Popen(["sleep", "60"]) as process:
        rank = LocalRank(0, process.pid, Packets(mine))
        monkeypatch.setattr(ranks, "start_of", lambda number: start_of(number) + 1)
        rank.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        monkeypatch.undo()
        rank.kill()
        assert process.wait(10) == -signal.SIGKILL


def test_a_wrong_report_of_a_rank_ends_it(client, start):
    start(client)
    link = client.accept()
    link.ready([0])
    link.say([0], play(1, do="fill", shape=[1, 1000]), job=1, lent=[10])
    assert isinstance(link.take(), Gone)


@pytest.mark.skipif("not config.getoption('--all-machines')", reason="takes 20 s; --all-machines runs it")
def test_ranks_that_do_not_end_the_job_of_a_client_that_is_gone_are_ended(client, start):
    machine = start(client)
    link = client.accept()
    link.ready([0])
    link.say([0], play(1, do="hang"), job=1)
    time.sleep(0.1)
    link.link.close()
    began = time.monotonic()
    assert machine.processes[0].wait(45) == -signal.SIGKILL and time.monotonic() - began > 15
