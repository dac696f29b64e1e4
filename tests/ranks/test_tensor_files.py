"""From each kind of file of tensors, a part comes as it is, without a byte of the rest."""

import os

import gloo_ranks
import pytest
import torch
import torch.distributed.checkpoint
from ascend_runtime.checkpoints.opening import open_tensors
from safetensors.torch import save_file

PARTS = {
    "rows": {"matrix": (slice(2, 5), slice(0, 6)), "cube": (slice(1, 4), slice(0, 3), slice(0, 2))},
    "columns": {"matrix": (slice(0, 7), slice(1, 4)), "cube": (slice(0, 5), slice(1, 2), slice(0, 2))},
    "both": {"matrix": (slice(3, 6), slice(2, 3)), "cube": (slice(2, 3), slice(0, 2), slice(1, 2))},
    "none": {"matrix": (slice(7, 7), slice(0, 6)), "cube": (slice(2, 2), slice(0, 3), slice(0, 2))},
}
KINDS = ("safetensors", "torch", "torch, wrapped", "distributed", "distributed, sharded")


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 6, generator=generator),
        "cube": torch.randn(5, 3, 2, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "eighths": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_file(tensors(), folder / "safetensors")
    torch.save(tensors(), folder / "torch")
    torch.save({"model": tensors(), "iteration": 3}, folder / "torch, wrapped")
    torch.distributed.checkpoint.save(tensors(), checkpoint_id=folder / "distributed", no_dist=True)
    sharded = {name: x for name, x in tensors().items() if name in ("matrix", "cube")}
    (folder / "group").mkdir()
    save_file(sharded, folder / "group" / "weights.safetensors")
    gloo_ranks.run("dcp_rank.py", folder / "group", 3)
    (folder / "distributed, sharded").symlink_to(folder / "group" / "checkpoint")
    return folder


@pytest.fixture
def bytes_read(monkeypatch):
    counts = []

    def preadv(*arguments, original=os.preadv):
        counts.append(original(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_dtypes_and_whole_tensors(files, kind):
    with open_tensors(files / kind) as file:
        expected = {name: x for name, x in tensors().items() if "sharded" not in kind or name in file.shapes}
        assert {name: tuple(x.shape) for name, x in expected.items()} == dict(file.shapes) and len(expected) > 1
        for name, tensor in expected.items():
            assert file.dtype(name) == tensor.dtype
            for made in (file.read(name), file.mapped(name)):
                assert torch.equal(made.float(), tensor.float()) and made.dtype == tensor.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_and_no_other_byte(files, kind, part, bytes_read):
    with open_tensors(files / kind) as file:
        for name, own in PARTS[part].items():
            bytes_read.clear()
            made, expected = file.read(name, own), tensors()[name][own]
            assert torch.equal(made, expected)
            assert sum(bytes_read) == expected.nbytes


def test_a_tensor_that_lies_in_another_order(tmp_path):
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).t()
    torch.save({"a": tensor, "b": tensor[1:3, 2:]}, tmp_path / "a")
    torch.distributed.checkpoint.save({"a": tensor}, checkpoint_id=tmp_path / "b", no_dist=True)
    for path in (tmp_path / "a", tmp_path / "b"):
        with open_tensors(path) as file:
            assert torch.equal(file.read("a"), tensor) and torch.equal(file.mapped("a"), tensor)
            part = (slice(1, 5), slice(2, 3))
            assert torch.equal(file.read("a", part), tensor[part])
    with open_tensors(tmp_path / "a") as file:
        assert torch.equal(file.read("b"), tensor[1:3, 2:]) and torch.equal(file.mapped("b"), tensor[1:3, 2:])


@pytest.mark.parametrize("device", ["npu:3", "cuda:0"])
def test_a_file_that_was_saved_from_a_card(tmp_path, monkeypatch, device):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: device)
        torch.save({"a": torch.arange(6.0)}, tmp_path / "a")
    with open_tensors(tmp_path / "a") as file:
        assert file.read("a").tolist() == file.mapped("a").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_folder_of_nothing_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without \.metadata"), open_tensors(tmp_path):
        pass
