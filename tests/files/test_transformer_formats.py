"""A transformer as the original, ComfyUI and MindSpeed-MM keep it: told by content, and equal to diffusers' network."""

import json
import os
import pickle
import shutil

import original_formats as formats
import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.checkpoints.states import files_of
from ascend_runtime.checkpoints.opening import open_tensors
from ascend_runtime.components import Components
from safetensors.torch import load_file, save_file

LAYERS = 3


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """By the original's names; seed 11."""
    file = random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=11, layers=LAYERS)
    return load_file(file)


def inputs():
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 16, 2, 4, 4, generator=generator)
    return latent, torch.tensor([600.0]), torch.randn(1, 6, random_wan.TEXT_DIM, generator=generator)


def load(path, **spec):
    spec = {"dtype": "float32", **spec}
    return Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(path), **spec), lambda *_: None)


@torch.no_grad()
def assert_equals_diffusers(network, tensors, what):
    latent, timestep, text = inputs()
    expected = formats.diffusers_transformer(tensors)(latent, timestep, text, return_dict=False)[0]
    made = tiny_models.velocity(network, latent, timestep, text)
    print(f"\n{what:45} largest difference {(made - expected).abs().max():.1e} of {expected.abs().max():.1f}")
    assert expected.std() > 0.1
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", formats.WRITERS)
def test_equals_diffusers(tmp_path, tensors, form):
    formats.WRITERS[form](tmp_path / "named as it likes", tensors)
    assert_equals_diffusers(load(tmp_path / "named as it likes").high_noise, tensors, form)


@pytest.mark.parametrize("form", formats.IN_8_BITS)
def test_8_bits_equal_their_dequantized_twin(tmp_path, tensors, form):
    twin = formats.IN_8_BITS[form](tmp_path / "wan", tensors)
    assert any((twin[name].float() != x).any() for name, x in tensors.items()), "the weights lost something"
    assert_equals_diffusers(load(tmp_path / "wan").high_noise, twin, form)


def test_scales_are_of_the_weight_before_it_is_rounded_to_the_blocks_dtype(tmp_path, tensors):
    kept, scales = formats.in_8_bits(tensors)
    formats.save_old_mark(tmp_path / "wan", kept, scales)
    made = load(tmp_path / "wan", dtype="bfloat16").high_noise.blocks[1].attn1.to_q.weight
    assert torch.equal(made, formats.dequantized(kept, scales)["blocks.1.self_attn.q.weight"].bfloat16())


@pytest.mark.parametrize("write", [formats.original_folder, formats.mindspeed_distributed])
def test_both_experts_by_the_root_folder(tmp_path, tensors, write):
    other = {name: x + 0.5 if name == "head.head.bias" else x for name, x in tensors.items()}
    write(tmp_path / "high_noise_model", tensors)
    with pytest.raises(ValueError, match="no low_noise_model next to it"):
        load(tmp_path)
    write(tmp_path / "low_noise_model", other)
    model = load(tmp_path, experts="resident")
    assert torch.equal(model.high_noise.proj_out.bias, tensors["head.head.bias"])
    assert torch.equal(model.low_noise.proj_out.bias, other["head.head.bias"])


def test_a_wholly_read_pth_is_a_view_of_the_file(tmp_path, tensors):
    torch.save(tensors, tmp_path / "wan.pth")
    network = load(tmp_path / "wan.pth").high_noise
    mapped = [line for line in open("/proc/self/maps") if line.rstrip().endswith("wan.pth")]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for name, parameter in network.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name


def test_the_fingerprint_changes_with_any_file(tmp_path, tensors):
    for form in ("the original's folder", "MindSpeed-MM, two stages", "MindSpeed-MM, distributed", "a .pth"):
        path = tmp_path / form
        formats.WRITERS[form](path, tensors)
        before = find_transformer(str(path)).fingerprint
        assert find_transformer(str(path)).fingerprint == before
        files = [file for shard in find_transformer(str(path)).shards for file in
                 (shard.iterdir() if shard.is_dir() else [shard])]  # fmt: skip
        os.utime(max(files), (1, 1))
        assert find_transformer(str(path)).fingerprint != before, form


def test_a_transformer_of_48_channels_has_the_latent_format_of_the_wan_22_vae(tmp_path):
    generator = torch.Generator().manual_seed(6)
    shapes = random_wan._original_shapes(256, 1, channels=48, out_channels=48)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, tmp_path / "wan")
    model = load(tmp_path / "wan")
    latents = model.latents
    assert latents.mean.shape == latents.std.shape == (1, 48, 1, 1, 1)
    assert latents.mean[0, 0].item() == pytest.approx(-0.2289) and len(latents.format.rgb) == 48
    assert latents.std[0, 47].item() == pytest.approx(0.7744)


@pytest.mark.parametrize("mean", [[0] * 15 + [2], [False] * 16, [10**30] * 16], ids=["whole", "false", "huge"])
def test_the_latent_format_of_a_vae_is_of_float_numbers_however_written(checkpoint, tmp_path, mean):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": mean}))
    latents = load(folder).latents
    assert latents.mean.dtype == latents.std.dtype == torch.float32
    assert torch.equal(latents.mean.flatten(), torch.tensor(list(map(float, mean))))


# What is refused, by name


def without(tensors, name):
    return {other: x for other, x in tensors.items() if other != name}


DAMAGE = {
    "missing: blocks.1.attn1.to_q.weight": lambda t: without(t, "blocks.1.self_attn.q.weight"),
    "unexpected: blocks.1.attn1.stranger": lambda t: t | {"blocks.1.attn1.stranger": torch.zeros(1)},
    "of the wrong shape: blocks.1.attn1.to_q.weight": lambda t: t | {"blocks.1.self_attn.q.weight": torch.zeros(2, 3)},
    "NaN or infinite values in blocks.1.attn1.to_q.weight":
        lambda t: t | {"blocks.1.self_attn.q.weight": torch.full((256, 256), float("nan"))},
    "is not a Wan transformer": lambda t: {"encoder.conv1.weight": torch.zeros(2)},
}  # fmt: skip


@pytest.mark.parametrize("form", ["the original's folder", "a .pth", "MindSpeed-MM, one stage",
                                  "MindSpeed-MM, distributed"])  # fmt: skip
@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_named(tmp_path, tensors, form, says):
    formats.WRITERS[form](tmp_path / "wan", DAMAGE[says](tensors))
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "wan")


def cut(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1000)


def test_a_file_that_changes_within_a_tick_of_the_clock_is_read_anew(tmp_path, tensors):
    """One of the same time, but another size: its tensors lie elsewhere."""
    other = {name: x + 0.5 if name == "head.head.bias" else x for name, x in tensors.items()}
    for form, path in (("a .pth", "wan.pth"), ("MindSpeed-MM, distributed", "dcp")):
        for given in (tensors, {"longer": torch.zeros(4000), **other}):
            shutil.rmtree(tmp_path / "dcp", ignore_errors=True)
            formats.WRITERS[form](tmp_path / path, given)
            files = [file for shard in find_transformer(str(tmp_path / path)).shards for file in files_of([shard])]
            for file in files:
                os.utime(file, ns=(10**18, 10**18))
            with open_tensors(find_transformer(str(tmp_path / path)).shards[0]) as file:
                name = next(name for name in file.shapes if name == "head.head.bias")
                assert torch.equal(file.read(name), given[name]), form


def test_cut_files_are_named(tmp_path, tensors):
    torch.save(tensors, tmp_path / "wan.pth")
    cut(tmp_path / "wan.pth")
    with pytest.raises(ValueError, match="wan.pth is not a complete torch.save file"):
        load(tmp_path / "wan.pth")
    formats.mindspeed_distributed(tmp_path / "dcp", tensors)
    cut(next((tmp_path / "dcp" / "iter_0001000").glob("*.distcp")))
    with pytest.raises(ValueError, match="distcp is missing or cut short"):
        load(tmp_path / "dcp")
    (tmp_path / "dcp" / "iter_0001000" / ".metadata").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match=r"\.metadata is not the metadata of a torch distributed checkpoint"):
        load(tmp_path / "dcp")


def test_mindspeed_folders_that_are_not_whole(tmp_path, tensors):
    folder = formats.mindspeed_release(tmp_path / "wan", tensors, (1, 2))
    (folder / "release" / "mp_rank_00_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match="mp_rank_00_001/model_optim_rng.pt does not exist"):
        load(folder)
    (folder / "release" / "mp_rank_01_000").mkdir()
    with pytest.raises(ValueError, match="in slices .*mp_rank_01_000.* resplit"):
        load(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    with pytest.raises(ValueError, match="names iter_0000020, which is missing"):
        load(folder)
    (folder / "latest_checkpointed_iteration.txt").write_bytes(b"\x9e")
    with pytest.raises(ValueError, match="iteration.txt: the iteration that it names cannot be used"):
        load(folder)


def test_another_8_bit_format_is_refused(tmp_path, tensors):
    kept, scales = formats.in_8_bits(tensors)
    layers = {"blocks.0.ffn.0": {"format": "svdquant_w4a4"}}
    marks = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(kept, tmp_path / "wan", metadata=marks)
    with pytest.raises(ValueError, match="holds blocks.0.ffn.0 as svdquant_w4a4. Use the model's fp8_scaled"):
        load(tmp_path / "wan")
    scales["blocks.0.ffn.0"] = torch.ones(512)
    formats.save_new_mark(tmp_path / "wan", kept, scales)
    with pytest.raises(ValueError, match=r"1 that are not a scale: blocks.0.ffn.0.weight_scale \[512\]"):
        load(tmp_path / "wan")


def test_a_scale_without_a_mark_is_a_stranger(tmp_path, tensors):
    save_file(tensors | {"blocks.0.ffn.0.scale_weight": torch.ones(())}, tmp_path / "wan")
    with pytest.raises(ValueError, match="1 unexpected: blocks.0.ffn.net.0.proj.scale_weight"):
        load(tmp_path / "wan")


def spring(folder):
    os.mkdir(folder)


class Trap:
    def __init__(self, call, folder):
        self.parts = call, (str(folder),)

    def __reduce__(self):
        return self.parts


def test_nothing_of_a_pickle_is_run(tmp_path, tensors):
    torch.save({"model": tensors, "args": Trap(spring, tmp_path / "sprung")}, tmp_path / "wan.pt")
    load(tmp_path / "wan.pt")
    torch.save({"model": tensors, "args": Trap(os.mkdir, tmp_path / "sprung")}, tmp_path / "wan.pt")
    with pytest.raises(ValueError, match="code in a file is never run"):
        load(tmp_path / "wan.pt")
    formats.mindspeed_distributed(tmp_path / "dcp", tensors)
    metadata = tmp_path / "dcp" / "iter_0001000" / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    content.planner_data = Trap(spring, tmp_path / "sprung")
    metadata.write_bytes(pickle.dumps(content))
    load(tmp_path / "dcp")
    content.planner_data = Trap(os.mkdir, tmp_path / "sprung")
    metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"\.metadata .* code in a file is never run"):
        load(tmp_path / "dcp")
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_an_old_torch_is_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "wan.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before 1.6. Save it again"):
        load(tmp_path / "wan.pth")


@pytest.mark.parametrize("start", [b"PK", bytes([0x80, 2])])
def test_a_safetensors_file_may_begin_with_any_length(tmp_path, start):
    """The length of its header is its first bytes, which can be the first of a zip or of a pickle too."""
    save_file({"encoder.conv1.weight": torch.zeros(2)}, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    length = int.from_bytes(start, "little")
    padding = b" " * (length - int.from_bytes(whole[:8], "little"))
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + whole[8:-8] + padding + whole[-8:])
    assert (tmp_path / "a").read_bytes().startswith(start)
    with pytest.raises(ValueError, match="is not a Wan transformer .* It is a Wan VAE"):
        load(tmp_path / "a")
