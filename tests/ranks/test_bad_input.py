"""A wrong request is a ValueError that says what was given, what is possible and what to do; the ranks survive it."""

import json
import logging
import shutil

import pytest
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize
from ascend_runtime.client import runtime as client_runtime
from ascend_runtime.hardware import devices
from ascend_runtime.models.registry import require_schedule
from ascend_runtime.specs import Plan
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

SHAPE = (1, 16, 1, 4, 4)
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


# Descriptions, refused before any rank hears of them


@pytest.mark.parametrize("make, says", [
    (lambda: VideoSize(width=830), ["width is 830", "multiple of 16", "816", "832"]),
    (lambda: VideoSize(height=479), ["height is 479", "464", "480"]),
    (lambda: VideoSize(height=0), ["height is 0", "16"]),
    (lambda: VideoSize(num_frames=80), ["num_frames is 80", "4n+1", "77", "81"]),
    (lambda: VideoSize(num_frames=0), ["num_frames is 0", "1", "5"]),
    (lambda: ParallelSpec(ranks=-1), ["ranks is -1", "0 for automatic"]),
    (lambda: ParallelSpec(cfg_degree=3), ["cfg_degree is 3", "1 or 2", "ulysses_degree"]),
    (lambda: ParallelSpec(ranks=8, cfg_degree=2, ulysses_degree=3),
        ["cfg_degree 2 x ring_degree auto x ulysses_degree 3 x tp_degree 1 does not match 8 ranks", "2 x 1 x 4 x 1",
         "for automatic"]),
    (lambda: ParallelSpec(ranks=3, cfg_degree=2), ["does not match 3 ranks", "1 x 1 x 3 x 1"]),
    (lambda: ParallelSpec(ranks=4, tp_degree=3), ["tp_degree 3 does not match 4 ranks", "1 x 1 x 1 x 4"]),
    (lambda: ParallelSpec(tp_degree=0), ["tp_degree is 0", "between 1 and 1024"]),
    (lambda: ParallelSpec(ring_exchange="swap"), ["ring_exchange is 'swap'", "rotate, gather"]),
    (lambda: SampleSpec(solver="ddim"), ["solver is 'ddim'", "unipc, euler, dpm++"]),
    (lambda: require_schedule("karras"), ["schedule is 'karras'", "own, simple, wan"]),
    (lambda: SampleSpec(steps=0), ["steps is 0", "between 1 and 1000"]),
    (lambda: SampleSpec(seed=-1), ["seed is -1", "between 0 and"]),
    (lambda: SampleSpec(shift=0.0), ["shift is 0.0", "0.01"]),
    (lambda: SampleSpec(guidance_scale=float("nan")), ["guidance_scale is nan", "between 0.0 and"]),
    (lambda: SampleSpec(sigmas=(0.5, 0.9, 0.0)), ["sigmas are [0.5, 0.9, 0.0]", "decreasing"]),
    (lambda: SampleSpec(sigmas=(1.0,)), ["at least two"]),
    (lambda: SampleSpec(sigmas=(1.0, float("nan"), 0.0)), ["nan", "decreasing"]),
    (lambda: DiffusionModelSpec(path="x", dtype="fp8"), ["dtype is 'fp8'", "auto, float32, bfloat16, float16"]),
    (lambda: DiffusionModelSpec(path="x", boundary=1.5), ["boundary is 1.5", "between 0.0 and 1.0"]),
    (lambda: Runtime(device="tpu"), ["device is 'tpu'", "auto, npu, cuda, cpu"]),
])  # fmt: skip
def test_descriptions(make, says):
    assert_says(pytest.raises(ValueError, make), says)


@pytest.mark.parametrize("given, ranks, plan", [
    ({}, 1, (1, 1, 1)), ({}, 2, (2, 1, 1)), ({}, 3, (1, 1, 3)), ({}, 8, (2, 1, 4)),
    ({"cfg_degree": 2, "ulysses_degree": 4}, 8, (2, 1, 4)),
    ({"cfg_degree": 2, "ulysses_degree": 4}, 2, (2, 1, 1)),
    ({"cfg_degree": 2, "ulysses_degree": 4}, 3, (1, 1, 3)),
    ({"cfg_degree": 2, "ulysses_degree": 2}, 8, (2, 2, 2)),
    ({"cfg_degree": 1}, 4, (1, 1, 4)),
    ({"ring_degree": 2}, 8, (2, 2, 2)),
    ({"ring_degree": 4, "cfg_degree": 1}, 4, (1, 4, 1)),
    ({"ulysses_degree": 2}, 2, (1, 1, 2)),
])  # fmt: skip
def test_with_automatic_ranks_degrees_are_a_wish(given, ranks, plan):
    cfg, ring, ulysses = plan
    assert ParallelSpec(**given).resolve(ranks, guided=True) == Plan(cfg=cfg, ring=ring, ulysses=ulysses)
    assert ParallelSpec(**given).resolve(ranks, guided=False) == Plan(ring=ring, ulysses=ulysses * cfg)


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_more_ranks_than_devices(monkeypatch, kind):
    def fake_count_visible(asked, *_):  # two devices of this kind, on a machine that has none
        return 2 if asked == kind else 1

    monkeypatch.setattr(devices, "count_visible", fake_count_visible)
    assert Runtime(device=kind).world_size == 2
    assert Runtime(ParallelSpec(ranks=2), device=kind).world_size == 2
    error = pytest.raises(ValueError, Runtime, ParallelSpec(ranks=3), device=kind)
    assert_says(error, ["ranks is 3", f"2 {kind} device(s)", "Set ranks to 0"])


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_a_device_that_is_not_there(monkeypatch, kind):
    def fake_count_visible(asked, *_):
        return int(asked == "cpu")

    monkeypatch.setattr(devices, "count_visible", fake_count_visible)
    assert_says(pytest.raises(ValueError, Runtime, device=kind), [f"device is '{kind}'", "no such device", "'auto'"])
    assert Runtime().device == "cpu"


def test_more_ranks_than_cores_warn(monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    with caplog.at_level(logging.WARNING):
        devices.warn_if_crowded(2, "cpu")
        assert not caplog.records
        devices.warn_if_crowded(3, "cpu")
    assert "ranks is 3" in caplog.text and "2 CPU core(s)" in caplog.text


# Requests, refused by the ranks


@pytest.fixture
def survivors(two_ranks, specs):
    """Two ranks; after the test they must be the same processes, and the next job right."""
    pids, expected = two_ranks.pids, good_job(two_ranks, specs)
    assert expected.std() > 0.1
    yield two_ranks
    assert two_ranks.pids == pids, "the refused job cost the ranks their lives"
    assert_close(good_job(two_ranks, specs), expected, atol=1e-5, rtol=0.0)
    assert two_ranks.pids == pids


def good_job(runtime, specs, shape=SHAPE):
    return sample(runtime, specs, latent=torch.zeros(shape))


def sample(runtime, specs, **changes):
    spec = SampleSpec(seed=1, steps=2, **changes.pop("spec", {}))
    arguments = {"latent": torch.zeros(SHAPE), "positive": specs.text(1), "negative": specs.text(2), **changes}
    return runtime.sample(specs.model, spec, **arguments).tensor


def load(runtime, component, path):
    """Loads the one component of a checkpoint."""
    if component == "transformer":
        runtime.load(model=DiffusionModelSpec(path=str(path)))
    elif component == "vae":
        runtime.load(vae=VaeSpec(path=str(path)))
    else:
        runtime.load(encoder=TextEncoderSpec(path=str(path)))


def assert_says(error, words):
    text = str(error.value)
    assert not [word for word in words if word not in text], text
    assert "Traceback" not in text


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "damaged")


def change_tensors(folder, component, change):
    """Rewrites the weights of a component; returns the file."""
    path = folder / component / WEIGHTS[component]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def widest(tensors):
    return max(tensors, key=lambda name: tensors[name].numel())


COMPONENTS = pytest.mark.parametrize("component", WEIGHTS)


@COMPONENTS
def test_a_path_that_does_not_exist(survivors, component, tmp_path):
    error = pytest.raises(ValueError, load, survivors, component, tmp_path / "nowhere")
    assert_says(error, [str(tmp_path / "nowhere"), "does not exist", "Give the path of"])


@COMPONENTS
def test_a_folder_without_the_component(survivors, component, tmp_path):
    (tmp_path / "photos").mkdir()
    error = pytest.raises(ValueError, load, survivors, component, tmp_path)
    assert_says(error, [f"no {component}/config.json", "it holds photos", "Give a folder of diffusers"])


@COMPONENTS
def test_a_folder_without_weights(survivors, component, damaged):
    (damaged / component / WEIGHTS[component]).unlink()
    error = pytest.raises(ValueError, load, survivors, component, damaged)
    assert_says(error, [str(damaged / component), "no .safetensors file", "Download"])


def test_a_shard_that_the_index_lists_and_nobody_has(survivors, damaged):
    index = damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": WEIGHTS["transformer"], "b": "second.safetensors"}}))
    error = pytest.raises(ValueError, load, survivors, "transformer", damaged)
    assert_says(error, ["lacks second.safetensors", index.name, "Download"])


def test_a_config_that_is_not_json(survivors, damaged):
    (damaged / "transformer" / "config.json").write_text("{")
    error = pytest.raises(ValueError, load, survivors, "transformer", damaged)
    assert_says(error, ["config.json is not JSON", "Download it again"])


def test_a_missing_tokenizer(survivors, damaged):
    shutil.rmtree(damaged / "tokenizer")
    error = pytest.raises(ValueError, load, survivors, "text_encoder", damaged)
    assert_says(error, [str(damaged / "tokenizer"), "does not exist", "next to"])


@COMPONENTS
def test_missing_unexpected_and_misshapen_tensors(survivors, component, damaged):
    names = []

    def change(tensors):
        lost = widest(tensors)
        bent = next(name for name in tensors if name != lost)
        tensors["stranger.weight"] = tensors.pop(lost)
        tensors[bent] = torch.zeros(*tensors[bent].shape, 2)
        names.extend([lost, bent])

    path = change_tensors(damaged, component, change)
    error = pytest.raises(ValueError, load, survivors, component, damaged)
    lost, bent = names
    says = [str(path), f"1 missing: {lost}", "1 unexpected: stranger.weight", f"1 of the wrong shape: {bent} is ["]
    assert_says(error, [*says, "another model"])


@COMPONENTS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(survivors, component, damaged, value):
    names = []

    def change(tensors):
        names.append(widest(tensors))
        tensors[names[0]].view(-1)[-1] = value

    path = change_tensors(damaged, component, change)
    error = pytest.raises(ValueError, load, survivors, component, damaged)
    assert_says(error, [str(path), "NaN or infinite values", names[0], "download it again"])


@COMPONENTS
@pytest.mark.parametrize("size, says", [
    (0, "is empty (0 bytes)"), (100, "is not a complete"), (-1000, "is not a complete")
])  # fmt: skip
def test_files_cut_short(survivors, component, damaged, size, says):
    path = damaged / component / WEIGHTS[component]
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)
    error = pytest.raises(ValueError, load, survivors, component, damaged)
    assert_says(error, [str(path), says, "Download it again"])


def test_a_file_of_another_network(survivors, checkpoint):
    path = checkpoint / "vae" / WEIGHTS["vae"]
    error = pytest.raises(ValueError, load, survivors, "transformer", path)
    assert_says(error, ["AV-1402: ", str(path), "is not a Wan transformer", "It is a Wan VAE."])


def test_a_file_of_another_component(survivors, checkpoint):
    vae, encoder = "Wan VAE", "UMT5 text encoder"
    for component, other, what, found in (("vae", "text_encoder", vae, encoder), ("text_encoder", "vae", encoder, vae)):
        path = checkpoint / other / WEIGHTS[other]
        error = pytest.raises(ValueError, load, survivors, component, path)
        assert_says(error, [str(path), f"is not a {what}", f"It is a {found}."])


def test_a_damaged_low_noise_expert_is_found_by_sampling_too(survivors, specs_of, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=2), tmp_path / "two experts")
    (folder / "transformer_2" / WEIGHTS["transformer"]).write_bytes(b"")
    error = pytest.raises(ValueError, sample, survivors, specs_of(folder))
    assert_says(error, ["transformer_2", "0 bytes"])


@pytest.mark.parametrize("changes, says", [
    ({"latent": torch.zeros(1, 48, 1, 4, 4)}, ["[1, 48, 1, 4, 4]", "[B,16,T,H,W]"]),
    ({"latent": torch.zeros(1, 16, 4, 4)}, ["[1, 16, 4, 4]", "[B,16,T,H,W]"]),
    ({"latent": torch.zeros(1, 16, 1, 5, 4)}, ["height is 40", "5 rows", "multiple of 16", "32 and 48"]),
    ({"latent": torch.zeros(1, 16, 0, 4, 4)}, ["[1, 16, 0, 4, 4]", "all sizes at least 1"]),
    ({"latent": torch.full(SHAPE, float("nan"))}, ["latent has NaN"]),
    ({"positive": torch.zeros(1, 512, 4096)}, ["positive", "[1, 512, 4096]", "[1, tokens, 32]", "text encoder"]),
    ({"negative": torch.zeros(512, 32)}, ["negative", "[512, 32]", "[1, tokens, 32]"]),
    ({"positive": torch.zeros(3, 512, 32)}, ["positive", "[3, 512, 32]", "[1, tokens, 32]"]),
    ({"positive": torch.full((1, 4, 32), float("inf"))}, ["positive", "NaN or infinite"]),
    ({"negative": None}, ["guidance_scale is 5.0", "negative prompt", "guidance_scale to 1"]),
    ({"parallel": ParallelSpec(ranks=4, ulysses_degree=4)}, ["plan is for 4 ranks", "group has 2", "group of 4"]),
])  # fmt: skip
def test_sample_requests(survivors, specs, changes, says):
    assert_says(pytest.raises(ValueError, sample, survivors, specs, **changes), says)


def test_ranks_too_refuse_a_schedule_that_they_do_not_know(survivors, specs, monkeypatch):
    """As another program could send it."""
    monkeypatch.setattr(client_runtime, "require_schedule", lambda name: None)
    error = pytest.raises(ValueError, sample, survivors, specs, spec={"schedule": "nonsense"})
    assert_says(error, ["schedule is 'nonsense'", "own, simple"])


@pytest.mark.parametrize("latent, says", [
    (torch.zeros(1, 48, 1, 4, 4), ["[1, 48, 1, 4, 4]", "[B,16,T,H,W]", "Wan 2.2 VAE"]),
    (torch.zeros(1, 16, 4, 4), ["[1, 16, 4, 4]", "[B,C,T,H,W]"]),
    (torch.zeros(1, 16, 0, 4, 4), ["[1, 16, 0, 4, 4]"]),
    (torch.full(SHAPE, float("nan")), ["latent to decode has NaN"]),
    (torch.full(SHAPE, float("-inf")), ["latent to decode has NaN or infinite"]),
])  # fmt: skip
def test_decode_requests(survivors, specs, latent, says):
    assert_says(pytest.raises(ValueError, survivors.decode, specs.vae, latent), says)


@pytest.mark.parametrize("value, says", [
    (float("nan"), "The video to encode, in frame 9 of 9, has NaN or infinite values. Check the node that made"),
    (float("inf"), "AV-1603: The video to encode, in frame 9 of 9"),
    (3e38, "The encoded video has NaN or infinite"),  # a number, of which the network makes none
])  # fmt: skip
def test_videos_that_are_no_numbers(survivors, specs, value, says):
    """In one rank's tile."""
    video = torch.rand(9, 32, 64, 3, generator=torch.Generator().manual_seed(1))
    expected = survivors.encode_video(specs.vae, video).tensor
    bad = video.clone()
    bad[-1, -1, -1, -1] = value
    assert_says(pytest.raises(ValueError, survivors.encode_video, specs.vae, bad), [says])
    assert_close(survivors.encode_video(specs.vae, video).tensor, expected, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_a_tile_that_overflows_is_refused_by_all(survivors, damaged):
    """Numbers behind the VAE's attention, which all tiles see, that fp32 cannot hold: the right tile has none."""

    def change(tensors):
        for name, weight in tensors.items():
            if "decoder.up_blocks" in name and name.endswith("resample.1.weight"):
                weight.mul_(1e4)

    change_tensors(damaged, "vae", change)
    theirs, vae = AutoencoderKLWan.from_pretrained(str(damaged / "vae")), VaeSpec(path=str(damaged))
    good = torch.randn(1, 16, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    bad = good.clone()
    bad[0, :, 1, 0, 0] = 1e30
    overflown = ~theirs.decode(bad).sample.isfinite()
    assert overflown[..., :64].any() and not overflown[..., 64:].any() and not overflown[:, :, 0].any()
    parts = ["AV-1606: The decoded video has NaN or infinite", "(rank 0)", "reaches 1e+30"]
    assert_says(pytest.raises(ValueError, survivors.decode, vae, bad), parts)
    frames = survivors.decode(vae, good).tensor * 2 - 1
    assert_close(frames, theirs.decode(good).sample[0].movedim(0, -1), atol=1e-4, rtol=0.0)


def test_a_dtype_that_is_too_narrow(survivors, specs_of, damaged):
    """Weights that fp16 holds, and products that it does not: the user hears it instead of seeing black frames."""
    change_tensors(damaged, "transformer", lambda tensors: tensors["proj_out.weight"].mul_(1e5))
    specs = specs_of(damaged)
    specs.model = DiffusionModelSpec(path=str(damaged), dtype="float16")
    parts = ["AV-1601: Step 1 of 2 (positive", "NaN or infinite", "behind its last block", "dtype bfloat16"]
    assert_says(pytest.raises(ValueError, sample, survivors, specs), parts)


def test_weights_that_a_dtype_does_not_hold(survivors, specs_of, damaged):
    path = change_tensors(damaged, "transformer", lambda tensors: tensors["proj_out.weight"].mul_(1e6))
    specs = specs_of(damaged)
    specs.model = DiffusionModelSpec(path=str(damaged), dtype="float16")
    says = [str(path), "proj_out.weight", "which exceed torch.float16", "bfloat16"]
    assert_says(pytest.raises(ValueError, sample, survivors, specs), says)
