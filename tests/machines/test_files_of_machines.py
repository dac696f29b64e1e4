"""Hosts with disks of their own: a file that differs is refused by name, and the ranks go on."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from ascend_runtime import DiffusionModelSpec, SampleSpec
from msgspec.structs import replace

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"
WEIGHTS = Path("wan", "transformer", "diffusion_pytorch_model.safetensors")
SPEC = DiffusionModelSpec(path="/models/wan")  # as a client has it


@pytest.fixture
def disks(tmp_path):
    """The folder of models on each host; a client has it as /models."""
    folders = {name: tmp_path / name / folder for name, folder in (("host1", "models"), ("host2", "disk/models"))}
    for folder in folders.values():
        shutil.copytree(MODEL, folder / "wan")
    return folders


@pytest.fixture
def pair(pairs):
    return pairs(1)


@pytest.fixture
def client(pair, disks):
    """A client that knows where the models are, after the other has stopped."""
    pair.client.stop()
    own, paths = pair.ranks.cluster, {name: {"/models": str(folder)} for name, folder in disks.items()}
    pair.ranks.cluster = replace(own, paths=paths)
    client = pair.ranks.client()
    yield client
    client.stop()
    pair.ranks.cluster = own


def test_a_file_that_differs_on_one_host_is_refused_by_name_and_the_next_job_runs_when_it_is_mended(
    pair, client, disks, tmp_path
):
    client.load(SPEC)
    started = pair.ranks.ranks(pair.hosts[1])
    other = disks["host2"] / WEIGHTS
    content = other.read_bytes()
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    error = refused(client)
    assert error.startswith("AV-1907: The machines have different files. The content of ")
    assert f"{disks['host1'] / WEIGHTS} on host1 and {other} on host2 differs" in error
    other.unlink()
    assert refused(client).startswith(f"AV-1907: On host2: {other.parent} has no ")
    other.write_bytes(content)
    latent = torch.zeros(1, 16, 2, 8, 8)
    result = client.sample(SPEC, SampleSpec(steps=1, guidance_scale=1.0), latent, torch.ones(1, 4, 128))
    assert result.tensor.shape == latent.shape and len(result.record.parts) == 1
    assert str(tmp_path).encode() not in msgspec.json.encode(result.record)  # no path of a machine
    assert pair.ranks.ranks(pair.hosts[1]) == started


def refused(client):
    with pytest.raises(ValueError) as raised:
        client.load(SPEC)
    return str(raised.value)
