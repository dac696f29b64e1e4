"""kill -9 of a rank, or of what ComfyUI is, in every phase: nothing stays behind, and the next job is right.

A sample of the kills by default; all 20 with --all-kills.
"""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ascend_runtime import RankDied
from killed_client import PHASES, latent_of
from rank_processes import holders, seconds_until, shared_memory
from safetensors.torch import load_file
from torch.testing import assert_close

GONE, HEARD = 3.0, 2.0  # seconds
RANKS_SAMPLE, CLIENTS_SAMPLE = ["load", "step", "decode"], ["start", "step", "idle"]
RANKS_ALL = [*PHASES, "step", "load", "start", "decode"]
CLIENTS_ALL = [phase for first in PHASES[:5] for phase in (first, "idle")]  # idle: after a job, which must be right
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def slow_checkpoint(checkpoints):
    """Deep enough that each phase lasts longer than it takes to be told of it."""
    return checkpoints(layers=24, text_layers=24)


@pytest.fixture(scope="module")
def expected(one_rank, slow_checkpoint):
    latent = latent_of(one_rank, slow_checkpoint)
    assert latent.std() > 0.1
    return latent


def chosen(request, sample, all_of_them):
    return all_of_them if request.config.getoption("--all-kills") else sample


def assert_nothing_named(pids):
    """The processes use no shared memory that has a name, which could outlive them."""
    for pid in pids:
        assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()


class Kill:
    """Kills a rank as soon as a job comes to a phase, or some time after."""

    def __init__(self, living, victim, phase, delay=0.0):
        self.living, self.victim, self.phase, self.delay = living, victim, phase, delay
        self.pids, self.memory, self.at = {}, set(), None

    def on_phase(self, phase):
        if phase == self.phase and self.at is None:
            if phase == "start":  # nobody tells of the phases of a start
                threading.Thread(target=self._strike_once_started).start()
            else:
                self.strike()

    def strike(self):
        self.pids = self.living()
        self.memory = shared_memory(self.pids.values())
        assert_nothing_named(self.pids.values())
        self.at = time.monotonic()
        os.kill(self.pids[self.victim], signal.SIGKILL)

    def _strike_once_started(self):
        seconds_until(lambda: self.victim in self.living(), timeout=30)
        time.sleep(self.delay)
        self.strike()


def test_kill_a_rank(request, new_runtime, slow_checkpoint, expected, marked, rng):
    environment, living = marked
    before = shared_memory([os.getpid()])
    with new_runtime(2, **environment) as runtime:
        for phase in chosen(request, RANKS_SAMPLE, RANKS_ALL):
            victim = rng.randrange(2)
            print(f"kill rank {victim} in phase {phase!r}")
            if phase == "start":
                runtime.stop()
            elif phase == "load":
                runtime.free()
            kill = Kill(living, victim, phase, delay=rng.uniform(0, 2))
            if phase == "idle":
                latent_of(runtime, slow_checkpoint)
                kill.strike()
            else:
                said = last_words(runtime, slow_checkpoint, kill)
                assert time.monotonic() - kill.at < HEARD, "the job heard too late of the death"
                assert f"Rank {victim} of 2 was killed by SIGKILL" in said
            gc.collect()
            await_nothing(living, kill.memory - before, kill.at)
            seconds_until(lambda: not runtime.alive, 1.0)
            assert not runtime.pids
            assert_close(latent_of(runtime, slow_checkpoint), expected, **TOLERANCE)
            assert len(living()) == 2
    assert not living()
    gc.collect()
    assert shared_memory([os.getpid()]) <= before


def test_kill_the_client(request, slow_checkpoint, expected, marked, rng, tmp_path):
    environment, living = marked
    for phase in chosen(request, CLIENTS_SAMPLE, CLIENTS_ALL):
        print(f"kill the client in phase {phase!r}")
        latent_file = tmp_path / "latent.safetensors"
        client = start_client(slow_checkpoint, latent_file, environment)
        try:
            wait_for_phase(client, phase)
            if phase == "start":
                time.sleep(rng.uniform(0, 2))
            if phase == "idle":
                assert_close(load_file(latent_file)["latent"], expected, **TOLERANCE)
            pids = living()
            memory = shared_memory(pids.values())
            assert pids[None] == client.pid
            assert phase == "start" or set(pids) == {None, 0, 1}
            assert_nothing_named(pids.values())
        finally:
            client.kill()
        killed_at = time.monotonic()
        client.wait()
        await_nothing(living, memory, killed_at)
        client.stdout.close()


def last_words(runtime, checkpoint, kill):
    """What the error of the job says; the error itself, whose traceback holds tensors, goes."""
    try:
        latent_of(runtime, checkpoint, kill.on_phase)
    except RankDied as error:
        return str(error)
    raise AssertionError("the job did not notice")


def await_nothing(living, memory, killed_at):
    """Until no process is left and nobody holds the memory that they held."""
    seconds_until(lambda: not living() and not holders(memory), GONE - (time.monotonic() - killed_at))
    print(f"nothing left after {time.monotonic() - killed_at:.2f} s")


def start_client(checkpoint, latent_file, environment):
    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(root / "tests" / "killed_client.py"), str(checkpoint), str(latent_file)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_phase(client, phase):
    for line in client.stdout:
        if line.strip() == phase:
            return
    raise AssertionError(f"the client ended with {client.wait()} before phase {phase!r}")
