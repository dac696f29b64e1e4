"""What could be meant in two ways is refused by name, and no file is used that nobody named."""

import json
import shutil

import pytest
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, SampleSpec
from killed_client import SHAPE
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

WEIGHTS = "diffusion_pytorch_model.safetensors"


def latent_of(runtime, model, text):
    spec = SampleSpec(seed=1, steps=2, guidance_scale=1.0)
    return runtime.sample(model, spec, torch.zeros(SHAPE), text).tensor


@pytest.fixture
def two_experts(checkpoints, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(checkpoints(experts=2), folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_home_and_relative_paths_mean_what_the_client_means(one_rank, specs, two_experts, monkeypatch):
    expected = latent_of(one_rank, DiffusionModelSpec(path=str(two_experts)), specs.text(1))
    monkeypatch.setenv("HOME", str(two_experts.parent))
    monkeypatch.chdir(two_experts.parent)
    for path in ("~/two", "two"):
        assert_close(latent_of(one_rank, DiffusionModelSpec(path=path), specs.text(1)), expected, atol=1e-6, rtol=0)


def test_a_single_file_takes_nothing_from_folders_beside_it(one_rank, tmp_path):
    file = random_wan.original_transformer(tmp_path / "models" / "diffusion_models" / "wan.safetensors")
    text = torch.randn(1, 8, random_wan.TEXT_DIM, generator=torch.Generator().manual_seed(3))
    expected = latent_of(one_rank, DiffusionModelSpec(path=str(file)), text)
    (tmp_path / "models" / "vae").mkdir()
    (tmp_path / "models" / "vae" / "config.json").write_text(json.dumps({"latents_mean": [9.0] * 16}))
    again = DiffusionModelSpec(path=str(file), dtype="float32")  # another description, so that it is loaded anew
    assert_close(latent_of(one_rank, again, text), expected, atol=1e-6, rtol=0)


def test_the_low_noise_expert_of_a_folder_is_its_own(one_rank, specs, two_experts):
    path = str(two_experts)
    expected = latent_of(one_rank, DiffusionModelSpec(path=path), specs.text(1))
    given_twice = DiffusionModelSpec(path=path, low_noise_path=path)
    assert_close(latent_of(one_rank, given_twice, specs.text(1)), expected, atol=1e-6, rtol=0)


def test_a_low_noise_expert_that_was_not_downloaded_is_missed(one_rank, specs, two_experts):
    shutil.rmtree(two_experts / "transformer_2")
    with pytest.raises(ValueError, match="lists a transformer_2, which is missing. Download"):
        latent_of(one_rank, DiffusionModelSpec(path=str(two_experts)), specs.text(1))


def test_one_file_is_not_both_experts(one_rank, specs):
    path = str(specs.folder)
    with pytest.raises(ValueError, match="given as both experts"):
        latent_of(one_rank, DiffusionModelSpec(path=path, low_noise_path=path), specs.text(1))


NAMES = [
    ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
    ("high_noise_model", "low_noise_model"),
    ("Wan2_2-T2V-A14B_HIGH_fp8.safetensors", "Wan2_2-T2V-A14B-LOW_fp8.safetensors"),
    ("highnoise/model.safetensors", "lownoise/model.safetensors"),
    ("low_noise/wan-high-noise.safetensors", "high_noise/wan-low-noise.safetensors"),
    ("WanHighNoise.safetensors", "WanLowNoise.safetensors"),
    ("smoothMixWan22_i2vHigh.safetensors", "smoothMixWan22_i2vLow.safetensors"),
    ("wan22_FP8High.safetensors", "wan22_FP8Low.safetensors"),
    ("wan22_highV8.safetensors", "wan22_lowV8.safetensors"),
    ("WAN22-I2V-HIGH-Q4_K_M.pth", "WAN22-I2V-LOW-Q4_K_M.pth"),
    ("Wan2.2-HIGH", "Wan2.2-LOW"),
    ("low_vram_high_noise.safetensors", "high_vram_low_noise.safetensors"),
]
TELL_NOTHING = [  # or not enough to refuse whoever means what he says
    ("highlands.safetensors", "lowlands.safetensors"),
    ("low_noise.safetensors", "other.safetensors"),
    ("high_and_low_noise/a", "high_and_low_noise/b"),
    ("low_noise_a", "low_noise_b"),
    ("wan_low_steps_hn.safetensors", "wan_high_steps_ln.safetensors"),
    ("low-rank_hnoise.safetensors", "high-rank_lnoise.safetensors"),
    ("wan22_I2V_low_res_H.safetensors", "wan22_I2V_high_res_L.safetensors"),
    ("low_vram/wan22_expert1.safetensors", "high_quality/wan22_expert2.safetensors"),
    ("low/wan22_expert1.safetensors", "high/wan22_expert2.safetensors"),
    ("wanLowCfg_h.safetensors", "wanHighCfg_l.safetensors"),
    ("yellow.safetensors", "wanHigh.safetensors"),
    ("wan_low_8bit_hn.safetensors", "wan_high_8bit_ln.safetensors"),
    ("wan_low_v2v.safetensors", "wan_high_v2v.safetensors"),
    ("slow_noise.safetensors", "high_noise.safetensors"),
    ("WanLowLight_1.safetensors", "WanHighLight_2.safetensors"),
]


@pytest.mark.parametrize("high, low", NAMES)
def test_experts_whose_names_say_that_they_are_exchanged(high, low):
    for folder in ("/models/", "/models/low_noise/", "/models/high_noise/"):
        DiffusionModelSpec(path=folder + high, low_noise_path=folder + low)
        with pytest.raises(ValueError, match="they are swapped. Exchange the two, or rename them"):
            DiffusionModelSpec(path=folder + low, low_noise_path=folder + high)


@pytest.mark.parametrize("one, other", TELL_NOTHING)
def test_names_that_do_not_tell_the_experts(one, other):
    for high, low in ((one, other), (other, one)):
        DiffusionModelSpec(path=f"/models/{high}", low_noise_path=f"/models/{low}")


def test_a_folder_whose_experts_were_exchanged(one_rank, specs, two_experts):
    """Only where the names of their files tell: their tensors are alike."""
    model, experts = DiffusionModelSpec(path=str(two_experts)), ("transformer", "transformer_2")
    expected = latent_of(one_rank, model, specs.text(1))
    for names in (("low_noise", "high_noise"), ("high_noise", "low_noise")):
        for expert, name in zip(experts, names):
            (file,) = (two_experts / expert).glob("*.safetensors")
            file.rename(file.with_name(f"{name}.safetensors"))
        if names[0] == "low_noise":
            with pytest.raises(ValueError, match="low_noise.safetensors is given as the high-noise expert"):
                latent_of(one_rank, model, specs.text(1))
    assert_close(latent_of(one_rank, model, specs.text(1)), expected, atol=1e-6, rtol=0)


def other_weights(folder):
    transformer = folder / "transformer"
    weights = load_file(transformer / WEIGHTS)
    for name in ("one.safetensors", "two.safetensors"):
        save_file(weights, transformer / name)
    (transformer / WEIGHTS).unlink()


@pytest.mark.parametrize("damage, says", [
    (other_weights, ["both hold", "Keep one"]),
    (lambda folder: (folder / "transformer" / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    (lambda folder: (folder / "transformer" / f"{WEIGHTS}.index.json").write_text("{}"), ["lacks weights"]),
    (lambda folder: edit(folder / "transformer" / "config.json", _class_name="AutoencoderKLWan"),
        ["AutoencoderKLWan", "must hold a WanTransformer3DModel"]),
    (lambda folder: edit(folder / "transformer" / "config.json", in_channels=40),
        ["40", "must read 16", "36, as an image-to-video"]),
    (lambda folder: edit(folder / "vae" / "config.json", latents_mean=[0.0] * 48, latents_std=[1.0] * 48),
        ["16 channels", "latent format has 48"]),
    (lambda folder: edit(folder / "transformer_2" / "config.json", text_dim=99), ["text_dim 99", "one model"]),
])  # fmt: skip
def test_refused_by_name(one_rank, specs, two_experts, damage, says):
    pids = one_rank.pids
    damage(two_experts)
    with pytest.raises(ValueError) as error:
        latent_of(one_rank, DiffusionModelSpec(path=str(two_experts)), specs.text(1))
    assert not [words for words in says if words not in str(error.value)], error.value
    assert one_rank.pids == pids


def test_a_single_file_without_its_head_is_named(one_rank, tmp_path):
    file = random_wan.original_transformer(tmp_path / "wan.safetensors")
    save_file({name: w for name, w in load_file(file).items() if name != "head.head.weight"}, file)
    with pytest.raises(ValueError, match="wan.safetensors lacks proj_out.weight"):
        latent_of(one_rank, DiffusionModelSpec(path=str(file)), torch.zeros(1, 8, random_wan.TEXT_DIM))
