"""`python -m ascend_runtime calibrate`: what it measures, what it fits, where it writes, and that jobs read it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import random_hunyuan
import tiny_llava
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec
from ascend_runtime import __main__ as command_line
from ascend_runtime.commands import calibration
from ascend_runtime.acceleration.step_rules import polynomial
from ascend_runtime.specs import AccelerationSpec, Calibration, StepCacheSpec
from ascend_runtime.recognition.calibration_file import calibration_file, read_calibration, write_calibration

ASSET = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"
SHAPE = (1, 16, 3, 6, 10)
SPEC = SampleSpec(seed=2, steps=6, shift=5.0, solver="euler", guidance_scale=1.0)
OPTIONS = ["--size", "32x32", "--frames", "5", "--steps", "8", "--ranks", "1", "--device", "cpu"]


def measured(runtime, specs, plan=None, spec=SPEC):
    texts = specs.text(1), specs.text(2)
    result = runtime.sample(specs.model, spec, torch.zeros(SHAPE), *texts, parallel=plan,
                            acceleration=AccelerationSpec(measure=True))  # fmt: skip
    return result, result.info["acceleration"]["changes"]


def test_changes_are_those_of_the_networks_tensors(one_rank, specs):
    """Seen by hooks in diffusers' transformer, on the way of an Euler solver."""
    result, changes = measured(one_rank, specs)
    network = tiny_models.wan_transformer()
    seen = {}
    network.condition_embedder.register_forward_hook(lambda module, _, out: seen.update(timestep=out[1]))
    network.patch_embedding.register_forward_hook(lambda module, _, out: seen.update(tokens=out.flatten(2).mT))
    network.blocks[-1].register_forward_hook(lambda module, _, out: seen.update(output=out))
    scheduler = tiny_models.scheduler(SPEC)
    x, before = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SPEC.seed)), None
    for step, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            velocity = network(x, timestep[None], specs.text(1), return_dict=False)[0]
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        if before is not None:
            now = changes[step - 1]
            norms = [(one["output"] - one["tokens"]).norm(dim=-1) for one in (seen, before)]
            assert (now["expert"], now["step"]) == ("high_noise", step)
            assert now["ratio"] == pytest.approx((norms[0] / norms[1]).mean().item(), rel=1e-3)
            for name in ("timestep", "output"):
                change = (seen[name] - before[name]).abs().sum() / before[name].abs().sum()
                assert now[name] == pytest.approx(change.item(), rel=1e-3), name
        before = dict(seen)
    dense = one_rank.sample(specs.model, SPEC, torch.zeros(SHAPE), specs.text(1)).tensor
    assert torch.equal(result.tensor, dense), "nothing is left out"


@pytest.mark.parametrize("plan", [{"cfg_degree": 2}, {"ulysses_degree": 2}, {"ring_degree": 2, "ulysses_degree": 1}])
def test_several_ranks_measure_as_one(one_rank, two_ranks, specs_of, checkpoints, plan):
    specs = specs_of(checkpoints(experts=2))
    spec = SampleSpec(seed=2, steps=6, shift=5.0, solver="euler", guidance_scale=3.0, guidance_scale_low_noise=1.0)
    _, expected = measured(one_rank, specs, spec=spec)
    _, changes = measured(two_ranks, specs, ParallelSpec(ranks=2, **plan), spec)
    assert {change["expert"] for change in changes} == {"high_noise", "low_noise"} and len(changes) == 4
    for one, other in zip(changes, expected):
        assert one.pop("expert") == other.pop("expert") and one == pytest.approx(other, rel=1e-3)


def test_the_fit_is_of_a_polynomial_that_is_known():
    known = (30.0, -20.0, 4.0, 1.0, 0.02)
    videos = [
        [{"expert": "high_noise", "step": step, "timestep": 0.02 * step, "ratio": 1 - 0.01 * step * (1 + video),
          "output": float(np.polyval(known, 0.02 * step))} for step in range(1, 9)]
        for video in (0, 1)
    ]  # fmt: skip
    found = calibration.fitted(videos, "a test")["high_noise"]
    assert found.ratios == (1.0, *(round(1 - 0.015 * step, 5) for step in range(1, 9))) and found.source == "a test"
    for x in (0.03, 0.1, 0.15):
        assert polynomial(found.coefficients, x) == pytest.approx(np.polyval(known, x), rel=1e-4)
    few = calibration.fitted([videos[0][:2]], "two points")["high_noise"]
    assert len(few.coefficients) == 2 and polynomial(few.coefficients, 0.02) == pytest.approx(videos[0][0]["output"])


@pytest.fixture
def model(checkpoints, tmp_path):
    return shutil.copytree(checkpoints(experts=2), tmp_path / "model")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ascend_runtime", "calibrate", *map(str, arguments)])
    return command_line.main()


@pytest.fixture
def no_new_ranks(one_rank, monkeypatch):
    """The command works with ranks that are there, and leaves them."""
    monkeypatch.setattr(calibration, "Runtime", lambda *_, **__: one_rank)
    monkeypatch.setattr(type(one_rank), "__exit__", lambda *_: None)


def test_it_writes_beside_the_model_and_jobs_read_it(model, monkeypatch, capsys, one_rank, specs_of, no_new_ranks):
    assert run(monkeypatch, model, *OPTIONS, "--random-prompts", 2) == 0
    out, err = capsys.readouterr()
    assert "2 videos of 32x32, 5 frames, 8 steps, shift 12, guidance 4 and 3 (low noise)" in err
    assert "video 2 of 2: denoised in" in err
    assert f"{calibration_file(str(model))}: 6 steps of high_noise, 2 steps of low_noise" in out
    found = read_calibration(str(model))
    assert [len(one.ratios) for one in found.values()] == [6, 2]
    assert all(one.ratios[0] == 1.0 and len(one.coefficients) == min(5, len(one.ratios) - 1) for one in found.values())
    specs = specs_of(model)
    for method in ("teacache", "magcache"):
        cache = AccelerationSpec(step_cache=StepCacheSpec(method=method, threshold=50.0))
        told = one_rank.sample(specs.model, SampleSpec(steps=8), torch.zeros(SHAPE), specs.text(1), specs.text(2),
                               acceleration=cache).info["acceleration"]  # fmt: skip
        assert told["steps_reusing"]
        assert told["calibration"]["low_noise"] == "calibrated with 2 videos of 32x32 x 5 in 8 steps, shift 12"


def test_it_encodes_prompts_and_writes_where_it_is_told(monkeypatch, tmp_path, no_new_ranks):
    file = tmp_path / "found.json"
    assert run(monkeypatch, ASSET, *OPTIONS, "--prompt", "a red circle", "--shift", 3, "--output", file) == 0
    assert len(file.read_bytes()) > 100 and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_hunyuan_model_is_calibrated_with_its_own_settings(monkeypatch, tmp_path, one_rank, capsys, no_new_ranks):
    """With prompts through both text encoders; jobs read the result for each method that needs one."""
    model = tiny_llava.save(random_hunyuan.folder(tmp_path))
    own = {"width": 64, "height": 48, "num_frames": 9, "steps": 8}
    (model / "ascend_defaults.json").write_text(json.dumps(own))
    assert run(monkeypatch, model, "--prompt", "a red circle", "--prompt", "a cat") == 0
    said = capsys.readouterr().err
    assert "2 videos of 64x48, 9 frames, 8 steps, shift 7, guidance 1, embedded guidance 6" in said
    (found,) = read_calibration(str(model)).values()
    assert len(found.ratios) == 8 and found.ratios[0] == 1.0 and len(found.coefficients) == 5
    prompt = one_rank.encode(TextEncoderSpec(path=str(model)), "a cat").conditioning
    for method in ("teacache", "magcache"):
        cache = AccelerationSpec(step_cache=StepCacheSpec(method=method, threshold=50.0))
        told = one_rank.sample(DiffusionModelSpec(path=str(model)), SampleSpec(), torch.zeros(SHAPE), prompt,
                               acceleration=cache).info["acceleration"]  # fmt: skip
        assert told["steps_reusing"] and told["calibration"] == {"high_noise": found.source}


@pytest.mark.parametrize("arguments, status, error", [
    (["--steps", "2"], 1, "fewer than the two"),
    (["--size", "33x32"], 2, "width is 33; it must be a multiple of 16"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(model, monkeypatch, capsys, no_new_ranks, arguments, status, error):
    assert run(monkeypatch, model, *OPTIONS, "--random-prompts", 1, *arguments) == status
    assert error in capsys.readouterr().err and not calibration_file(str(model)).exists()


def test_models_of_images_are_refused(monkeypatch, capsys, tmp_path, no_new_ranks):
    tiny_models.wan_transformer(in_channels=36).save_pretrained(tmp_path / "transformer")
    assert run(monkeypatch, tmp_path, *OPTIONS, "--random-prompts", 1) == 1
    assert "needs an image, but calibration uses text-to-video" in capsys.readouterr().err
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert calibration_file(str(file)).name == f"{file.name}.ascend_calibration.json"


def test_the_embedded_model_has_one():
    (found,) = read_calibration(str(ASSET)).values()
    assert len(found.ratios) == 20 and len(found.coefficients) == 5 and "20 steps, shift 3" in found.source


def test_it_is_written_as_it_is_read(tmp_path):
    known = {"low_noise": Calibration(coefficients=(1.5, -2.0), ratios=(1.0, 0.25), source="somewhere")}
    write_calibration(calibration_file(str(tmp_path)), known)
    assert read_calibration(str(tmp_path)) == known and read_calibration(str(tmp_path / "none")) == {}
