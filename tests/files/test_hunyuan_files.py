"""HunyuanVideo's transformer and VAE as the original, ComfyUI and diffusers keep them: recognised by content, and equal
to diffusers' networks."""

import json
import subprocess
import sys
from functools import partial

import hunyuan_formats as formats
import hunyuan_lora
import pytest
import random_hunyuan
import torch
from ascend_runtime import LoraSpec
from ascend_runtime.checkpoints.reader import load_weights
from ascend_runtime.components.networks import empty_network
from ascend_runtime.recognition.layout import find_transformer, find_vae
from hunyuan_formats import assert_equals_diffusers, assert_same, load, parameters
from safetensors.torch import load_file, save_file
from scripts.lib.comfy_server import COMFYUI

KINDS = [*random_hunyuan.KINDS]
HELPERS = formats.__file__.rpartition("/")[0]


@pytest.fixture(scope="module")
def networks():
    """diffusers' network of each kind; seed 0."""
    return {kind: random_hunyuan.transformer(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def network(networks):
    return networks["t2v"]


@pytest.fixture(scope="module")
def tensors(network):
    """By the original's names."""
    return formats.original_transformer(network.state_dict())


# Forms


@pytest.mark.parametrize("form", formats.WRITERS)
def test_a_transformer_of_the_originals_names_equals_diffusers(tmp_path, network, tensors, form):
    formats.WRITERS[form](tmp_path / "named as it likes", tensors)
    assert_equals_diffusers(load(tmp_path / "named as it likes"), network)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_in_diffusers_folder_and_by_both_systems_names(tmp_path, networks, kind):
    theirs = networks[kind]
    theirs.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="1MB")
    assert len(find_transformer(str(tmp_path / "model")).shards) > 1
    for name, rename in (("t", formats.original_transformer), ("core", formats.comfyui_transformer)):
        save_file(rename(theirs.state_dict()), tmp_path / name)
    state = theirs.state_dict()
    for name in ("model", "t", "core"):
        made = load(tmp_path / name)
        assert_same(parameters(made), state)
        shown = name == "model" or kind == "i2v concat"
        assert made.config.image_condition_type == (theirs.config.image_condition_type if shown else "either")
    config = find_transformer(str(tmp_path / "core")).config
    assert {key: theirs.config[key] for key in config if key != "image_condition_type"} == {
        key: value for key, value in config.items() if key != "image_condition_type"
    }


def test_the_originals_folder_by_any_of_its_paths(tmp_path, network, tensors):
    root = formats.original_folder(tmp_path / "ckpts", tensors)
    model = root / "hunyuan-video-t2v-720p"
    worth = formats.original_fp8(model / "transformers", tensors)
    vae = random_hunyuan.vae()
    formats.original_vae(model / "vae", vae)
    file = model / "transformers" / f"{formats.MASTER}.pt"
    for path in (root, model, model / "transformers", file):
        assert_same(parameters(load(path)), network.state_dict())
    in_8_bits = load(file.with_name(f"{formats.MASTER}_fp8.pt"))
    assert_equals_diffusers(in_8_bits, formats.diffusers_transformer(network, worth))
    for path in (root, model, model / "vae", model / "vae" / "pytorch_model.pt"):
        assert_same(vae_parameters(path), vae.state_dict())
    before = find_transformer(str(file)).fingerprint
    assert find_transformer(str(file)).fingerprint == before
    formats.original_folder(tmp_path / "ckpts", tensors, "i2v")
    with pytest.raises(ValueError, match="ckpts holds several models: hunyuan-video-i2v-720p, hunyuan-video-t2v-720p"):
        load(root)
    load(root / "hunyuan-video-i2v-720p")


def test_fp8_weights_and_their_scales_belong_together(tmp_path, tensors):
    formats.original_fp8(tmp_path, tensors)
    file, scales = (tmp_path / f"{formats.MASTER}_{name}.pt" for name in ("fp8", "fp8_map"))
    before = find_transformer(str(file)).fingerprint
    held = torch.load(scales)
    layer = next(iter(held))
    torch.save({**held, layer: torch.ones(2)}, scales)
    with pytest.raises(ValueError, match="fp8_map.pt holds .*, which is not one number"):
        load(file)
    torch.save({name: scale for name, scale in held.items() if name != layer}, scales)
    assert find_transformer(str(file)).fingerprint != before
    with pytest.raises(ValueError, match=f"1 without a scale: {layer}.weight"):
        load(file)
    scales.unlink()
    with pytest.raises(ValueError, match="whose scales are in mp_rank_00_model_states_fp8_map.pt. Put it "):
        load(file)


def test_other_files_may_end_like_the_published_pair_and_need_no_scales(tmp_path, network, tensors):
    casts = {name: x.to(torch.float8_e4m3fn) if x.ndim == 2 and "blocks" in name else x for name, x in tensors.items()}
    torch.save(casts, tmp_path / "hunyuan_fp8.pt")
    twin = {name: x.float() for name, x in casts.items()}
    assert_equals_diffusers(load(tmp_path / "hunyuan_fp8.pt"), formats.diffusers_transformer(network, twin))


@pytest.mark.parametrize("form", formats.IN_8_BITS)
def test_8_bits_equal_their_dequantized_twin(tmp_path, network, tensors, form):
    """With and without scales, in each of ComfyUI's marks."""
    twin = formats.IN_8_BITS[form](tmp_path / "hunyuan", tensors)
    assert any((twin[name].float() != x).any() for name, x in tensors.items()), "the weights lost something"
    assert_equals_diffusers(load(tmp_path / "hunyuan"), formats.diffusers_transformer(network, twin))


def vae_parameters(path):
    component = find_vae(str(path))
    made = empty_network(component)
    places = component.places_in(made)
    load_weights(made, places, dtype_of=lambda name: torch.float32, device=torch.device("cpu"))
    return made.state_dict()


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_vae_by_the_names_of_diffusers_and_of_comfyui(tmp_path, prefix):
    vae = random_hunyuan.vae()
    vae.save_pretrained(tmp_path / "model" / "vae")
    for name, held in (("own", vae.state_dict()), ("core", formats.comfyui_vae(vae.state_dict()))):
        save_file({prefix + key: x for key, x in held.items()}, tmp_path / name)
        assert_same(vae_parameters(tmp_path / name), vae.state_dict())
        config = find_vae(str(tmp_path / name)).config
        assert {key: vae.config[key] for key in config} == {**config, "block_out_channels": (32, 32, 64, 64)}
    assert_same(vae_parameters(tmp_path / "model"), vae.state_dict())


# Core ComfyUI reads the same files


def in_any(parts, layer):
    return any(part in layer for part in parts)


@pytest.fixture(scope="module")
def by_core(tmp_path_factory):
    """(folder, diffusers' network, what core makes of each case): its own network, of files in the folder."""
    folder = tmp_path_factory.mktemp("core")
    theirs = random_hunyuan.transformer(**random_hunyuan.AS_CORE)
    save_file(formats.original_transformer(theirs.state_dict()), folder / "model.safetensors")
    save_file(formats.comfyui_transformer(theirs.state_dict()), folder / "core.safetensors")
    cases = {name: {"file": f"{name}.safetensors", "lora": None} for name in ("model", "core")}
    for number, (layout, known) in enumerate(hunyuan_lora.KNOWN_TO_CORE.items()):
        keep = partial(in_any, known)
        added = hunyuan_lora.save(folder / f"{number}.safetensors", layout, theirs.state_dict(), number, keep)
        assert len(added) > 20
        cases[layout] = {"file": "model.safetensors", "lora": f"{number}.safetensors", "strength": 0.7}
    (folder / "cases.json").write_text(json.dumps(cases))
    inputs = random_hunyuan.inputs(theirs.config)._asdict()
    save_file({**inputs, "guidance": inputs["guidance"] / 1000}, folder / "inputs.safetensors")
    command = [sys.executable, f"{HELPERS}/core_hunyuan.py", str(COMFYUI), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, theirs, load_file(folder / "made.safetensors")


@torch.no_grad()
def test_core_makes_the_same_of_the_same_files(by_core):
    folder, theirs, made = by_core
    inputs = random_hunyuan.inputs(theirs.config)
    for case, expected in made.items():
        path = folder / f"{case}.safetensors"
        lora = folder / f"{[*hunyuan_lora.KNOWN_TO_CORE].index(case)}.safetensors" if not path.exists() else None
        loras = (LoraSpec(path=str(lora), strength=0.7),) if lora else ()
        ours = random_hunyuan.velocity(load(folder / "model.safetensors" if lora else path, loras=loras), inputs)
        print(f"\n{case:30} largest difference {(ours - expected).abs().max():.1e} of {expected.abs().max():.1f}")
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


# LoRAs


@pytest.mark.parametrize("layout", hunyuan_lora.LAYOUTS)
def test_a_lora_changes_each_layer_by_its_formula(tmp_path, network, tensors, layout):
    save_file(tensors, tmp_path / "model")
    state = network.state_dict()
    added = hunyuan_lora.save(tmp_path / "lora.safetensors", layout, state, seed=3)
    assert any(name.endswith("proj_out.weight") for name in added) and len(added) > 40
    lora = LoraSpec(path=str(tmp_path / "lora.safetensors"), strength=0.5)
    made = parameters(load(tmp_path / "model", loras=(lora,)))
    for name, weight in state.items():
        expected = weight + 0.5 * added[name] if name in added else weight
        torch.testing.assert_close(made[name], expected, atol=1e-6, rtol=1e-6)
