"""Clients of a cluster, one after the other, with the real worker that torchrun starts: two machines by name, both on
127.0.0.1. With --all-machines, as torchrun takes its time; tests/machines/ has hosts of their own.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ascend_runtime import Cluster, JobCancelled, RankDied, Runtime, SampleSpec
from ascend_runtime.wire.tls import make_key
from played_machines import free_port
from rank_processes import environment_of
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (1, 16, 2, 8, 8)
MACHINES = ("left", "right")


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    """Two machines with a rank each; their logs are next to the key."""
    if not request.config.getoption("--all-machines"):
        pytest.skip("takes half a minute: --all-machines")
    folder = tmp_path_factory.mktemp("cluster")
    make_key(folder / "pair.key", "pair")
    listen, meeting = (f"127.0.0.1:{free_port()}" for _ in range(2))
    torchruns = []
    for name in MACHINES:
        with open(folder / f"{name}.log", "ab") as log:
            torchruns.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                 "--max-restarts=100", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}",
                 "-m", "ascend_runtime.engine.worker", "--client", listen, "--key", str(folder / "pair.key"),
                 "--machine", name, "--device", "cpu"],
                cwd=ROOT, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_WAIT_POLICY": "PASSIVE"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            ))  # fmt: skip
    yield Cluster(name="pair", listen=listen, key=str(folder / "pair.key"), ranks=2)
    for torchrun in torchruns:
        torchrun.kill()
        torchrun.wait()
    for name in MACHINES:
        print((folder / f"{name}.log").read_text()[-5000:])


def rank_of(machine):
    """The process id of a machine's rank proper."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            environment = environment_of(int(process.name))
            if environment.get("ASCEND_RUNTIME_MACHINE") == machine and "ASCEND_RUNTIME_CONTROL_FD" in environment:
                return int(process.name)
    raise AssertionError(f"{machine} has no rank")


def sampled(runtime, specs, **given):
    spec = SampleSpec(seed=1, steps=given.pop("steps", 2), guidance_scale=1.0)
    return runtime.sample(specs.model, spec, torch.zeros(SHAPE), specs.text(3), **given)


@pytest.mark.timeout(600)
def test_a_second_client_finds_the_weights_loaded(cluster, specs, one_rank):
    with Runtime(cluster=cluster) as first:
        stages = set()
        result = sampled(first, specs, on_progress=lambda stage, step, total: stages.add(stage))
        assert first.machines == ["left", "right"] and first.device == "cpu" and stages == {"load", "denoise"}
        frames = first.decode(specs.vae, result.tensor)
        ranks = [rank_of(machine) for machine in MACHINES]
    with Runtime(cluster=cluster) as second:
        stages = set()  # "load" only if weights are read
        again = sampled(second, specs, on_progress=lambda stage, step, total: stages.add(stage))
        assert stages == {"denoise"} and again.seconds["load"] < result.seconds["load"] / 5
        assert [rank_of(machine) for machine in MACHINES] == ranks
    single = sampled(one_rank, specs)
    assert_close(result.tensor, single.tensor, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.tensor, again.tensor)
    assert_close(frames.tensor, one_rank.decode(specs.vae, single.tensor).tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(600)
def test_a_cancel_keeps_the_ranks(cluster, specs):
    with Runtime(cluster=cluster) as runtime:
        sampled(runtime, specs)
        ranks = [rank_of(machine) for machine in MACHINES]
        with pytest.raises(JobCancelled):
            sampled(runtime, specs, steps=100, on_progress=lambda stage, step, total: runtime.cancel())
        sampled(runtime, specs)
        assert [rank_of(machine) for machine in MACHINES] == ranks


@pytest.mark.timeout(600)
def test_a_rank_that_is_killed_ends_the_job_and_the_next_one_runs(cluster, specs):
    with Runtime(cluster=cluster) as runtime:
        before = sampled(runtime, specs).tensor
        killed = []

        def kill(stage, step, total):
            if stage == "denoise" and not killed:
                os.kill(rank_of("right"), signal.SIGKILL)
                killed.append(time.monotonic())

        with pytest.raises(RankDied, match="AV-1906: Rank 1 of 2, on the machine right, has ended"):
            sampled(runtime, specs, steps=100, on_progress=kill)
        assert time.monotonic() - killed[0] < 10
        assert torch.equal(sampled(runtime, specs).tensor, before)
