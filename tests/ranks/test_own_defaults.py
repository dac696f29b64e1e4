"""What a model's own file says that it is run with: read strictly, used by ranks, commands and conversions alike."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import random_lora
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, SampleSpec, VideoSize, model_defaults
from ascend_runtime.commands import conversion
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.models.wan.defaults import WAN21_TEXT, WAN22_BOTH, WAN22_TEXT
from gloo_ranks import run
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "assets" / "tiny_wan"
NAME = "ascend_defaults.json"
sys.path.insert(0, str(ROOT / "scripts"))

from tiny_wan import export


@pytest.fixture
def model(tmp_path):
    """The embedded model's transformer and what stands next to it, in a folder of the test's own."""
    leave_out = shutil.ignore_patterns("text_encoder", "tokenizer", "*.png")
    return shutil.copytree(ASSET, tmp_path / "model", ignore=leave_out)


def text(seed=1):
    return torch.randn(1, 20, 128, generator=torch.Generator().manual_seed(seed))


def test_the_embedded_model_has_what_its_export_writes():
    assert json.loads((ASSET / NAME).read_text()) == export.DEFAULTS
    own = model_defaults(str(ASSET))
    assert own.size == VideoSize(width=64, height=64, num_frames=17) and own.fps == 16
    assert (own.steps, own.shift, own.guidance_scale, own.source) == (20, 3.0, 4.0, ASSET / NAME)


def test_ranks_take_what_the_file_says(one_rank, model):
    (model / NAME).write_text(json.dumps(export.DEFAULTS | {"steps": 3}))
    spec, latent = DiffusionModelSpec(path=str(model)), torch.zeros(VideoSize(**size()).latent_shape())
    first = one_rank.sample(spec, SampleSpec(), latent, text(1), text(2))
    assert {name: first.info[name] for name in ("steps", "shift", "guidance")} == {
        "steps": 3, "shift": 3.0, "guidance": 4.0
    }  # fmt: skip
    given = one_rank.sample(spec, SampleSpec(steps=3, shift=3.0, guidance_scale=4.0), latent, text(1), text(2))
    assert torch.equal(given.tensor, first.tensor)
    (model / NAME).write_text(json.dumps(export.DEFAULTS | {"steps": 2}))
    assert one_rank.sample(spec, SampleSpec(), latent, text(1), text(2)).info["steps"] == 2, "read again as it changed"
    (model / NAME).write_text('{"steps": "many"}')
    with pytest.raises(ValueError, match=f"{NAME} cannot be used: Expected .int . null., got .str.*steps"):
        one_rank.sample(spec, SampleSpec(), latent, text(1), text(2))


def size():
    return {name: export.DEFAULTS[name] for name in ("width", "height", "num_frames")}


def test_ranks_that_read_different_settings_say_so_instead_of_waiting_for_each_other(tmp_path):
    run("agreement_rank.py", tmp_path, 2)


def test_a_changed_file_counts_from_the_next_job_on(two_ranks, model):
    spec, latent = DiffusionModelSpec(path=str(model)), torch.zeros(1, 16, 1, 4, 4)
    for steps in (2, 3):
        (model / NAME).write_text(json.dumps(export.DEFAULTS | {"steps": steps}))
        assert two_ranks.sample(spec, SampleSpec(), latent, text(1), text(2)).info["steps"] == steps


def test_a_lora_of_few_steps_brings_its_own_settings(one_rank, checkpoint, specs, tmp_path):
    """With the sigmas that it was trained for, and without a negative prompt; a next job without it has the model's."""
    lora = tmp_path / "Wan21_CausVid_T2V_lora.safetensors"
    parameters = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    random_lora.save(lora, "diffusers", parameters, seed=3)
    model = DiffusionModelSpec(path=str(checkpoint), loras=(LoraSpec(path=str(lora)),))
    latent = torch.zeros(1, 16, 1, 4, 4)
    made = one_rank.sample(model, SampleSpec(), latent, specs.text(1))
    assert {name: made.info[name] for name in ("distilled", "steps", "guidance")} == {
        "distilled": "CausVid", "steps": 3, "guidance": 1.0
    }  # fmt: skip
    given = SampleSpec(sigmas=(1.0, 0.757, 0.522, 0.0), guidance_scale=1.0, solver="euler")
    assert torch.equal(one_rank.sample(model, given, latent, specs.text(1)).tensor, made.tensor)
    plain = DiffusionModelSpec(path=str(checkpoint))
    info = one_rank.sample(plain, SampleSpec(steps=1), latent, specs.text(1), specs.text(2)).info
    assert info["guidance"] == 5.0 and "distilled" not in info


@pytest.mark.parametrize("content, says", [
    ("[]", "does not hold a JSON object"),
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('{"stps": 3}', "unknown field `stps`"),
    ('{"steps": 2.5}', "got `float` - at `$.steps`"),
    ('{"steps": true}', "got `bool` - at `$.steps`"),
    ('{"steps": 1000000}', "steps is 1000000; it must be between 1 and 1000"),
    ('{"steps": 1' + "0" * 400 + "}", "a number of 401 digits"),
    ('{"shift": NaN}', "the number NaN"),
    ('{"guidance_scale": Infinity}', "the number Infinity"),
    ('{"width": 65}', "width is 65; it must be a multiple of 16, from 16 to 16384. The nearest are 64 and 80"),
    ('{"width": 999999984}', "The nearest is 16384"),
    ('{"width": 16384, "height": 16384}', "pixels, a video's limit. Give at most 29 frames"),
    ('{"num_frames": 18}', "The nearest are 17 and 21"),
    ('{"fps": 0}', "fps is 0; it must lie between 1 and 240"),
    ('{"width": [64]}', "got `array` - at `$.width`"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_by_name(model, content, says):
    (model / NAME).write_text(content)
    with pytest.raises(ValueError) as error:
        model_defaults(str(model))
    assert says in str(error.value) and str(model / NAME) in str(error.value)
    assert str(error.value).endswith("or remove it to use the defaults of Wan2.1-T2V.")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(model, make):
    (model / NAME).unlink()
    make(model / NAME)
    with pytest.raises(ValueError, match=f"{NAME} is not a regular file"):
        model_defaults(str(model))


def test_it_belongs_to_a_model_in_any_layout(model, tmp_path):
    """Next to a folder's parts, found from the transformer's own folder too; next to a file, under its name."""
    assert model_defaults(str(model / "transformer")).steps == 20
    file = random_wan.original_transformer(tmp_path / "wan.safetensors")
    assert model_defaults(str(file)) == WAN21_TEXT
    before = find_transformer(str(file)).fingerprint
    (tmp_path / f"wan.safetensors.{NAME}").write_text('{"steps": 8}')
    assert model_defaults(str(file)).steps == 8 and model_defaults(str(file)).shift == WAN21_TEXT.shift
    assert find_transformer(str(file)).fingerprint != before


def test_one_guidance_scale_is_that_of_both_experts(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=2), tmp_path / "model")
    assert model_defaults(str(folder)) == WAN22_TEXT
    for said, filled in (({"guidance_scale": 2.0}, (2.0, 2.0)), ({"guidance_scale_low_noise": 2.0}, (4.0, 2.0)),
                         ({"steps": 9}, (4.0, 3.0))):  # fmt: skip
        (folder / NAME).write_text(json.dumps(said))
        spec = model_defaults(str(folder)).fill(SampleSpec(), pixels=1)
        assert (spec.guidance_scale, spec.low_noise_guidance) == filled


def test_published_models_have_sizes_that_can_be_made():
    assert WAN21_TEXT.size == VideoSize() and WAN22_BOTH.size == VideoSize(width=1280, height=704, num_frames=121)


def test_a_conversion_keeps_it(model, tmp_path):
    plan = conversion.planned(model, "diffusers", None, "5GB")
    conversion.convert(plan, tmp_path / "made", {})
    for name in (NAME, "ascend_calibration.json"):
        assert (tmp_path / "made" / name).read_bytes() == (model / name).read_bytes()
    assert model_defaults(str(tmp_path / "made")).steps == 20
