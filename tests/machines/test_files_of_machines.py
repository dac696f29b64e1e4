"""Hosts with disks of their own: a file that differs is refused by name, and the ranks go on."""

import shutil
from pathlib import Path

import cluster_ranks
import hosts
import msgspec
import pytest
import torch
from ascend_runtime import DiffusionModelSpec, SampleSpec
from msgspec.structs import replace

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"
WEIGHTS = Path("wan", "transformer", "diffusion_pytorch_model.safetensors")
SPEC = DiffusionModelSpec(path="/models/wan")  # as a client has it


def test_a_file_that_differs_on_one_host_is_refused_by_name_and_the_next_job_runs_when_it_is_mended(tmp_path):
    hosts.require()
    disks = {name: tmp_path / name / folder for name, folder in (("host1", "models"), ("host2", "disk/models"))}
    for disk in disks.values():
        shutil.copytree(MODEL, disk / "wan")
    with hosts.Hosts(2) as two, cluster_ranks.ClusterRanks(two, 1, tmp_path / "cluster") as ranks:
        paths = {name: {"/models": str(disk)} for name, disk in disks.items()}
        ranks.cluster = replace(ranks.cluster, paths=paths)
        runtime = ranks.client()
        try:
            runtime.load(SPEC)
            started = ranks.ranks(two[1])
            other = disks["host2"] / WEIGHTS
            content = other.read_bytes()
            other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            error = refused(runtime)
            assert error.startswith(f"AV-1907: The machines have different files. The content of {disks['host1']}")
            assert f"{disks['host1'] / WEIGHTS} on host1 and {other} on host2 differs" in error
            other.unlink()
            assert refused(runtime).startswith(f"AV-1907: On host2: {other.parent} has no ")
            other.write_bytes(content)
            latent = torch.zeros(1, 16, 2, 8, 8)
            result = runtime.sample(SPEC, SampleSpec(steps=1, guidance_scale=1.0), latent, torch.ones(1, 4, 128))
            assert result.tensor.shape == latent.shape and len(result.record.parts) == 1
            assert str(tmp_path).encode() not in msgspec.json.encode(result.record)  # no path of a machine
            assert ranks.ranks(two[1]) == started
        finally:
            runtime.stop()


def refused(runtime):
    with pytest.raises(ValueError) as raised:
        runtime.load(SPEC)
    return str(raised.value)
