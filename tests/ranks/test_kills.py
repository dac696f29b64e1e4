"""kill -9 of a rank, or of what ComfyUI is, in every phase: nothing stays behind, and the next job is right.

Of ranks also in the middle of every kind of exchange. A sample of the kills by default; all with --all-kills.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ascend_runtime import ParallelSpec, RankDied
from exchanges import EXCHANGES
from killed_client import PHASES, latent_of
from rank_processes import holders, seconds_until, shared_memory, waits
from safetensors.torch import load_file
from torch.testing import assert_close

GONE, HEARD = 3.0, 2.0  # seconds
RANKS_SAMPLE = ["decode"]
RANKS_ALL = [*PHASES, "step", "load", "start", "decode"]
CLIENTS_ALL = [phase for first in PHASES[:-1] for phase in (first, "idle")]  # idle: after a job, which must be right
STEPS = {name: (plan, "step") for name, plan in EXCHANGES.items()}  # a kind of exchange: (the plan, its phase)
BORDERS = {
    f"borders, {phase} on {ranks}": ({"ranks": ranks}, phase)
    for ranks in (2, 3)
    for phase in ("decode", "encode video")
}
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def slow_checkpoint(checkpoints):
    """Deep enough that each phase lasts longer than it takes to hear of it."""
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


class KillWithinExchange(Kill):
    """Some time after the first step of a phase, halts the victim until all others wait for it, and kills it then."""

    def __init__(self, living, victim, phase, delay):
        super().__init__(living, victim, phase, delay)
        self.come_to, self.thread = None, None

    def on_phase(self, phase):
        self.come_to = phase
        if phase == self.phase and self.thread is None:
            self.thread = threading.Thread(target=self._strike_within)
            self.thread.start()

    def _strike_within(self):
        time.sleep(self.delay)
        ranks = {rank: pid for rank, pid in self.living().items() if rank is not None}
        os.kill(ranks.pop(self.victim), signal.SIGSTOP)
        still = 0
        while still < 5:  # looks in a row, so that one between two exchanges does not count
            still = still + 1 if all(map(waits, ranks.values())) else 0
            time.sleep(0.02)
        self.strike()


@pytest.mark.timeout(1800)  # with --all-kills
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
                assert_heard(runtime, slow_checkpoint, kill)
            gc.collect()
            await_nothing(living, kill.memory - before, kill.at)
            seconds_until(lambda: not runtime.alive, 1.0)
            assert not runtime.pids
            assert_close(latent_of(runtime, slow_checkpoint), expected, **TOLERANCE)
            assert len(living()) == 2
    assert not living()
    gc.collect()
    assert shared_memory([os.getpid()]) <= before


@pytest.mark.timeout(1800)  # with --all-kills
def test_kill_a_rank_within_an_exchange(request, new_runtime, slow_checkpoint, expected, marked, rng):
    environment, living = marked
    before = shared_memory([os.getpid()])
    everything = STEPS | BORDERS
    one = rng.choice([name for name, (plan, _) in everything.items() if plan["ranks"] == 2])
    strikes = chosen(request, {one: everything[one]}, everything)
    for ranks in sorted({plan["ranks"] for plan, _ in strikes.values()}):
        with new_runtime(ranks, **environment) as runtime:
            for name, (options, phase) in strikes.items():
                if options["ranks"] != ranks:
                    continue
                plan, victim = ParallelSpec(**options), rng.randrange(ranks)
                print(f"kill rank {victim} of {ranks} within {name}")
                kill = KillWithinExchange(living, victim, phase, delay=rng.uniform(0, 0.3))
                assert_heard(runtime, slow_checkpoint, kill, plan)
                kill.thread.join()
                assert kill.come_to == phase, "the kill came after the exchanges"
                gc.collect()
                await_nothing(living, kill.memory - before, kill.at)
                assert_close(latent_of(runtime, slow_checkpoint, parallel=plan), expected, **TOLERANCE)
                assert len(living()) == ranks
        assert not living()
    gc.collect()
    assert shared_memory([os.getpid()]) <= before


@pytest.mark.timeout(1800)  # with --all-kills
def test_kill_the_client(request, slow_checkpoint, expected, marked, rng, tmp_path):
    environment, living = marked
    two = {"ranks": 2}
    everything = [(phase, two) for phase in CLIENTS_ALL] + [("step", plan) for plan in EXCHANGES.values()]
    on_two = [(phase, plan) for phase, plan in everything if plan["ranks"] == 2 and phase != "idle"]
    for phase, plan in chosen(request, [rng.choice(on_two)], everything):
        print(f"kill the client in phase {phase!r} of {plan}")
        latent_file = tmp_path / "latent.safetensors"
        client = start_client(slow_checkpoint, latent_file, environment, plan)
        try:
            wait_for_phase(client, phase)
            if phase == "start":
                time.sleep(rng.uniform(0, 2))
            if phase == "step":  # from the first on
                time.sleep(rng.uniform(0, 0.3))
            if phase == "idle":
                assert_close(load_file(latent_file)["latent"], expected, **TOLERANCE)
            pids = living()
            memory = shared_memory(pids.values())
            assert pids[None] == client.pid
            assert phase == "start" or set(pids) == {None, *range(plan["ranks"])}
            assert_nothing_named(pids.values())
        finally:
            client.kill()
        killed_at = time.monotonic()
        client.wait()
        await_nothing(living, memory, killed_at)
        client.stdout.close()


def assert_heard(runtime, checkpoint, kill, plan=None):
    """The job ends soon after the kill, and its error names the victim."""
    said = last_words(runtime, checkpoint, kill, plan)
    assert time.monotonic() - kill.at < HEARD, "the job heard too late of the death"
    assert said.startswith(f"AV-1501: Rank {kill.victim} of {runtime.world_size} was killed by SIGKILL")


def last_words(runtime, checkpoint, kill, plan):
    """What the error of the job says; the error itself, whose traceback holds tensors, goes."""
    try:
        latent_of(runtime, checkpoint, kill.on_phase, plan, and_back=kill.phase == "encode video")
    except RankDied as error:
        return str(error)
    raise AssertionError("the job did not notice")


def await_nothing(living, memory, killed_at):
    """Until no process is left and nobody holds the memory that they held."""
    seconds_until(lambda: not living() and not holders(memory), GONE - (time.monotonic() - killed_at))
    print(f"nothing left after {time.monotonic() - killed_at:.2f} s")


def start_client(checkpoint, latent_file, environment, plan):
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    script = root / "tests" / "helpers" / "killed_client.py"
    return subprocess.Popen(
        [sys.executable, str(script), str(checkpoint), str(latent_file), json.dumps(plan)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_phase(client, phase):
    for line in client.stdout:
        if line.strip() == phase:
            return
    raise AssertionError(f"the client ended with {client.wait()} before phase {phase!r}")
