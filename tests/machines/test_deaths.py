"""A machine, its link, its torchrun or the client goes, in each phase: the job ends soon and names the machine, nothing
of ours stays, and the next job is right.

A sample by default; all with --all-machines.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ascend_runtime import RankDied
from cluster_ranks import ENVIRONMENT, seconds_until_none
from killed_client import latent_of
from rank_processes import seconds_until
from safetensors.torch import load_file
from torch.testing import assert_close

HEARD, GONE, BACK = 10.0, 60.0, 180.0  # seconds
PHASES = ("joining", "load", "encode", "step", "decode", "idle")
NEAR = {"atol": 1e-4, "rtol": 0.0}
SMALL = 2**20  # bytes, less than the weights


# What happens to one of two machines, each a function of (the pair, the host)


def cut(pair, host):
    """Its link, in silence."""
    host.cut()


def powered_off(pair, host):
    """All its processes are killed, and its link is cut: nobody says goodbye."""
    host.cut()
    host.kill()


def killed(pair, host):
    """All its processes are killed; the kernel closes their connections."""
    host.kill()


def torchrun_killed(pair, host):
    pair.ranks.processes[host].kill()


def rank_killed(pair, host):
    os.kill(max(pair.ranks.ranks(host).values()), signal.SIGKILL)


def relay_killed(pair, host):
    os.kill(pair.ranks.relays(host)[0], signal.SIGKILL)


STRIKES = (cut, powered_off, killed, torchrun_killed, rank_killed, relay_killed)
FIRST_TOO = (torchrun_killed, killed, rank_killed)  # also on the host with torchrun's rendezvous, and the client
SAMPLE = {("rank_killed", 1, "step")}


def sweep():
    for strike in STRIKES:
        for number in (0, 1) if strike in FIRST_TOO else (1,):
            for phase in PHASES:
                yield pytest.param(strike, number, phase, id=f"{strike.__name__}, host{number + 1}, {phase}")


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--all-machines")
    if "strike" in metafunc.fixturenames:
        some = [case for case in sweep() if every or (case.values[0].__name__, *case.values[1:]) in SAMPLE]
        metafunc.parametrize("strike, number, phase", some)
    elif "phase" in metafunc.fixturenames:
        metafunc.parametrize("phase", PHASES if every else ["step"])


@pytest.fixture(scope="module")
def slow_checkpoint(checkpoints):
    """Deep enough that each phase lasts longer than it takes to hear of it."""
    return checkpoints(layers=24, text_layers=24)


@pytest.fixture(scope="module")
def expected(one_rank, slow_checkpoint):
    latent = latent_of(one_rank, slow_checkpoint)
    assert latent.std() > 0.1
    return latent


class Job(threading.Thread):
    """A video by way of all phases. on_phase: called when it has come to one."""

    def __init__(self, client, checkpoint, on_phase=lambda phase: None):
        super().__init__(daemon=True)
        self.client, self.checkpoint, self.on_phase = client, checkpoint, on_phase
        self.latent = self.error = self.ended_at = None
        self.start()

    def run(self):
        try:
            self.latent = latent_of(self.client, self.checkpoint, self.on_phase)
        except Exception as error:
            self.error = error
        self.ended_at = time.monotonic()


class Blow:
    """Strikes once, when a job comes to a phase."""

    def __init__(self, pair, strike, host, phase):
        self.pair, self.strike, self.host, self.phase = pair, strike, host, phase
        self.at, self.before = None, {}
        self.fallen = threading.Event()

    def on_phase(self, phase):
        if phase == self.phase and self.at is None:
            self.fall()

    def fall(self):
        self.before = {host: set(self.pair.ranks.ours(host)) for host in self.pair.hosts}
        self.at = time.monotonic()
        self.strike(self.pair, self.host)
        self.fallen.set()


def next_job_is_right(pair, checkpoint, expected):
    """Also where torchrun must be started again, as a supervisor would."""
    job, began = Job(pair.client, checkpoint), time.monotonic()
    while job.is_alive():
        pair.ranks.revive()
        job.join(0.2)
        assert time.monotonic() - began < BACK, f"no job after {BACK} s:\n{pair.ranks.output[-6000:]}"
    if job.error is not None:
        raise job.error
    assert_close(job.latent, expected, **NEAR)
    return time.monotonic() - began


@pytest.mark.timeout(600)
def test_a_machine_goes(pairs, slow_checkpoint, expected, strike, number, phase):
    pair = pairs(1)
    host, other = pair.hosts[number], pair.hosts[1 - number]
    blow = Blow(pair, strike, host, phase)
    if phase == "joining":
        return while_joining(pair, blow, slow_checkpoint, expected)
    if phase == "load":
        pair.client.free()
    job = Job(pair.client, slow_checkpoint, blow.on_phase)
    if phase == "idle":
        job.join(120)
        blow.fall()
        seconds_until(lambda: not pair.client.alive, HEARD)
    else:
        job.join(120 + HEARD)
        assert isinstance(job.error, RankDied), job.error
        said = str(job.error)
        assert job.ended_at - blow.at < HEARD
        assert said.startswith("AV-1906") and host.name in said and other.name not in said.split("\n")[0], said
    silent = strike in (cut, powered_off)
    if phase != "idle":
        for one in [other] if silent else pair.hosts:
            left = GONE - (time.monotonic() - blow.at)
            seconds_until_none(lambda: blow.before[one] & set(pair.ranks.ours(one)), left)
    host.mend()
    next_job_is_right(pair, slow_checkpoint, expected)
    survived = [blow.before[one] & set(pair.ranks.ours(one)) for one in pair.hosts]
    kept = strike is cut and phase == "idle" and survived == [blow.before[one] for one in pair.hosts]
    assert kept or not any(survived), "some have survived the group"  # a cut between two jobs may cost no ranks


def while_joining(pair, blow, checkpoint, expected):
    """The ranks are starting again, and a job waits for them. It goes on to wait, or ends with the machine's name."""
    before = set(pair.ranks.ours(blow.host))
    rank_killed(pair, pair.hosts[1])
    seconds_until(lambda: not pair.client.alive, HEARD)
    job = Job(pair.client, checkpoint)
    seconds_until(lambda: all(found and not before & set(found) for found in started_on(pair, blow.host)), GONE)
    blow.fall()
    time.sleep(1)
    blow.host.mend()
    began = time.monotonic()
    while job.is_alive():
        pair.ranks.revive()
        job.join(0.2)
        assert time.monotonic() - began < BACK, f"no job after {BACK} s:\n{pair.ranks.output[-6000:]}"
    if job.error is not None:
        assert isinstance(job.error, RankDied) and blow.host.name in str(job.error), job.error
    else:
        assert_close(job.latent, expected, **NEAR)
    next_job_is_right(pair, checkpoint, expected)


def started_on(pair, host):
    """Its ranks proper, and its relays."""
    return pair.ranks.ranks(host).values(), pair.ranks.relays(host)


# The client


def start_client(pair, checkpoint, latent_file):
    root = Path(__file__).resolve().parents[2]
    script = root / "tests" / "helpers" / "killed_client.py"
    cluster = {"name": pair.ranks.cluster.name, "listen": pair.ranks.cluster.listen, "key": pair.ranks.cluster.key,
               "ranks": pair.ranks.cluster.ranks}  # fmt: skip
    return pair.hosts[0].start(
        [sys.executable, script, checkpoint, latent_file, "{}", json.dumps(cluster)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def bytes_read(pids):
    """From files, by these processes so far."""
    found = 0
    for pid in pids:
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        found += int(counts["rchar"])
    return found


@pytest.mark.timeout(600)
def test_the_client_is_killed(pairs, slow_checkpoint, expected, tmp_path, phase):
    """Its ranks wait, and serve the next client with what they have loaded."""
    pair = pairs(1)
    latent_of(pair.client, slow_checkpoint)
    pair.client.stop()
    ranks = {host: pair.ranks.ranks(host) for host in pair.hosts}
    wanted = "start" if phase == "joining" else "idle" if phase == "load" else phase
    client = start_client(pair, slow_checkpoint, tmp_path / "latent")
    try:
        for line in client.stdout:
            if line.strip() == wanted:
                break
        else:
            raise AssertionError(f"the client ended before it came to {wanted}")
        if phase == "idle":
            assert_close(load_file(tmp_path / "latent")["latent"], expected, **NEAR)
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
    pair.client.start()
    read = bytes_read(pid for found in ranks.values() for pid in found.values())
    assert {host: pair.ranks.ranks(host) for host in pair.hosts} == ranks, "the ranks are not those that waited"
    assert_close(latent_of(pair.client, slow_checkpoint), expected, **NEAR)
    if phase in ("step", "idle"):
        again = bytes_read(pid for found in ranks.values() for pid in found.values())
        assert again - read < SMALL, "weights were read again"
