"""Fun Control and Fun Inpaint transformers: recognised, loaded and converted; refused by name where they do not fit."""

from argparse import Namespace

import pytest
import random_wan
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec
from ascend_runtime.commands import conversion
from ascend_runtime.components import Components
from ascend_runtime.models.shared.conditioning import Given
from ascend_runtime.models.wan.family import FAMILY
from ascend_runtime.recognition.layout import find_transformer
from safetensors.torch import load_file

CONTROL, INPAINT = "Wan2.2-Fun-A14B-Control", "Wan2.2-Fun-5B-InP"
KINDS = {  # by the published name: how a small one is made (random_wan.original_transformer)
    "Wan2.1-Fun-V1.1-14B-Control": {"channels": 48, "image": True, "reference": True},
    CONTROL: {"channels": 52, "reference": True},
    "Wan2.2-Fun-5B-Control": {"channels": 148, "out_channels": 48, "reference": True},
    INPAINT: {"channels": 100, "out_channels": 48},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fun")
    return {
        name: random_wan.original_transformer(folder / f"{name}.safetensors", layers=1, **kind)
        for name, kind in KINDS.items()
    }


def load(path, **spec):
    return Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(path), **spec), lambda *_: None)


def convert(source, target, to):
    return conversion.run(Namespace(source=str(source), target=str(target), to=to, dtype="keep", shard_size="5GB"))


@pytest.mark.parametrize("name", KINDS)
def test_a_file_shows_its_channels_and_its_layer_for_a_reference(files, name):
    config, kind = find_transformer(str(files[name])).config, KINDS[name]
    out_channels = kind.get("out_channels", 16)
    assert (config["in_channels"], config["out_channels"]) == (kind["channels"], out_channels)
    assert config.get("in_dim_ref_conv") == (out_channels if "reference" in kind else None)
    assert "Fun" in FAMILY.defaults(config, experts=1).name


@pytest.mark.parametrize("to", ["diffusers", "mindspeed"])
@pytest.mark.parametrize("name", KINDS)
def test_a_converted_network_has_all_weights(tmp_path, files, name, to, capsys):
    assert convert(files[name], tmp_path / "made", to) == 0
    before, after = (dict(load(path, dtype="float32").high_noise.named_parameters())
                     for path in (files[name], tmp_path / "made"))  # fmt: skip
    assert before.keys() == after.keys() and ("ref_conv.weight" in after) == ("reference" in KINDS[name])
    assert all(torch.equal(before[one], after[one]) for one in before)
    held = load_file(files[name])
    assert "ref_conv.weight" not in held or torch.equal(after["ref_conv.weight"], held["ref_conv.weight"])


def test_experts_of_two_kinds_are_refused(files, tmp_path):
    plain = random_wan.original_transformer(tmp_path / "plain.safetensors", layers=1, channels=52)
    for other, says in ((plain, "has in_dim_ref_conv None, but"), (files[INPAINT], "has in_channels 100, but")):
        with pytest.raises(ValueError, match=says) as error:
            load(files[CONTROL], low_noise_path=str(other), boundary=0.875)
        assert "Use two experts of one model" in str(error.value)


def test_other_numbers_of_channels_are_refused(tmp_path):
    """32: of a model whose control video has no image."""
    file = random_wan.original_transformer(tmp_path / "wan.safetensors", layers=1, channels=32)
    with pytest.raises(ValueError) as error:
        load(file)
    assert f"{file} reads 32 channels and makes 16. It must read 16, as a text-to-video model" in str(error.value)
    assert "36, as an image-to-video model, or 48 or 52, as a Fun Control model" in str(error.value)


def test_a_sampling_job_refuses_a_control_model_and_names_the_loader(files):
    given = Given(torch.zeros(1, 16, 3, 6, 8), None, {"positive": Conditioning(text=torch.zeros(1, 7, 4096))})
    with pytest.raises(ValueError) as error:
        load(files[CONTROL]).conditioner.check(given)
    assert "a Fun Control model, which reads 36 further channels" in str(error.value)
    assert "Load it with Ascend Load Diffusion Model (Core)" in str(error.value)


def test_a_sampling_job_of_an_inpaint_model_takes_a_mask_and_a_video(files):
    latent, video = torch.zeros(1, 48, 3, 6, 8), torch.ones(1, 48, 3, 6, 8)
    mask = torch.zeros(1, 4, 3, 6, 8)
    prompt = Conditioning(text=torch.zeros(1, 7, 4096), concat_latent=video, concat_mask=mask)
    conditioner = load(files[INPAINT]).conditioner
    given = Given(latent, None, {"positive": prompt})
    conditioner.check(given)
    branch = conditioner.branch(prompt, given, torch.device("cpu"), torch.float32)
    assert branch.input(latent).shape == (1, 100, 3, 6, 8) and branch.concat[:, :4].eq(1).all()
