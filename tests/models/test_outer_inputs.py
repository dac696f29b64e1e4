"""Samplers outside of the ranks give both families' transformers what core ComfyUI's models make; core's networks are
the reference."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import outer_cases
import pytest
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.components import Components
from ascend_runtime.models.shared.conditioning import Inputs
from ascend_runtime.recognition.layout import find_transformer
from outer_cases import CASES, Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts.lib.comfy_server import COMFYUI

HELPERS = Path(outer_cases.__file__).parent
CPU, SEED = torch.device("cpu"), 5


class ByCore(NamedTuple):
    """folder: with FILE.safetensors. made: velocities by case; found: facts by file (see core_networks)."""

    folder: Path
    made: dict
    found: dict


@pytest.fixture(scope="module")
def by_core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    files, shapes = outer_cases.write(folder), {}
    for file in files:
        component = find_transformer(str(folder / f"{file}.safetensors"))
        shapes[f"{file}.safetensors"] = component.family.original_shapes(component.config)
    (folder / "shapes.json").write_text(json.dumps(shapes))
    (folder / "cases.json").write_text(json.dumps({name: f"{case.file}.safetensors" for name, case in CASES.items()}))
    for name, case in CASES.items():
        latent, timesteps, inputs = case.drawn(SEED)
        tensors = dict(inputs.tensors)
        if "concat" in tensors:
            latent = torch.cat([latent, tensors.pop("concat")], dim=1)
        given = {"latent": latent, "timesteps": timesteps, "context": tensors.pop("text"), **tensors}
        save_file({key: x.contiguous() for key, x in given.items()}, folder / f"{name}-inputs.safetensors")
    command = [sys.executable, f"{HELPERS}/core_networks.py", str(COMFYUI), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return ByCore(folder, load_file(folder / "made.safetensors"), json.loads((folder / "found.json").read_text()))


@lru_cache(maxsize=None)
def loaded(folder: Path, file: str):
    spec = DiffusionModelSpec(path=str(folder / f"{file}.safetensors"), dtype="float32")
    return Components(CPU).get(spec, lambda *_: None)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_pass_makes_what_cores_network_makes(by_core, name):
    case = CASES[name]
    latent, timesteps, inputs = case.drawn(SEED)
    model = loaded(by_core.folder, case.file)
    model.conditioner.check_inputs(inputs)
    branch = model.conditioner.outer_branch(inputs, CPU, torch.float32)
    size = branch.input(latent).shape[2:]
    further = "reference_latent" in inputs.tensors
    assert model.conditioner.outer_size(inputs) == (size[0] + further, *size[1:])
    made = branch.output(model.high_noise(branch.input(latent), branch.timesteps(timesteps), branch.context()))
    expected = by_core.made[name]
    assert expected.std() > 0.1 and made.shape == expected.shape == latent.shape
    torch.testing.assert_close(made, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("file", [*outer_cases.WAN, *outer_cases.HUNYUAN])
def test_core_recognises_a_network_by_the_shapes_that_its_family_says(by_core, file):
    found = by_core.found[f"{file}.safetensors"]
    assert found["class"] == found["class of the file"]
    assert found["config"].items() <= found["config of the file"].items()  # loading adds the dtype to it
    with safe_open(by_core.folder / f"{file}.safetensors", framework="pt") as opened:
        held = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}
    component = find_transformer(str(by_core.folder / f"{file}.safetensors"))
    shapes = {name: list(shape) for name, shape in component.family.original_shapes(component.config).items()}
    assert shapes == held == found["shapes"]


# What is refused


def inputs_of(case: Case, **tensors) -> Inputs:
    """Of a case; with these tensors, or without those that are None."""
    _, _, inputs = case.drawn(SEED)
    given = {**inputs.tensors, **tensors}
    return Inputs(inputs.shape, {name: tensor for name, tensor in given.items() if tensor is not None})


@pytest.fixture(scope="module")
def conditioner(by_core):
    return lambda case: loaded(by_core.folder, case.file).conditioner


WRONG = {  # what the error says: the case, and what is wrong with its inputs
    "the input vace_context, which this model does not read. It belongs to a VACE model": ("text", {
        "vace_context": torch.zeros(1)}),
    "the input camera_conditions": ("image, 2.2, odd", {"camera_conditions": torch.zeros(1)}),
    "the input audio_embed": ("text", {"audio_embed": torch.zeros(1)}),
    "the input strange, which this model does not read. Remove": ("text", {"strange": torch.zeros(1)}),
    "the input clip_fea, of a CLIP vision model, which this model does not read": ("image, 2.2, odd", {
        "clip_fea": torch.zeros(1, 257, 1280)}),
    "clip_fea has the shape [1, 257, 64]": ("image, 2.1", {"clip_fea": torch.zeros(1, 257, 64)}),
    "the input reference_latent (a ref_image), which this model does not read": ("image, 2.2, odd", {
        "reference_latent": torch.zeros(1, 16, 5, 8)}),
    "reference_latent has the shape [1, 16, 6, 6]": ("control, 2.2", {"reference_latent": torch.zeros(1, 16, 6, 6)}),
    "must be even; they are 5 x 8": ("control, 2.2", {
        "reference_latent": torch.zeros(1, 16, 5, 8), "concat": torch.zeros(1, 36, 3, 5, 8), "size": (3, 5, 8)}),
    "time_dim_concat has the shape [1, 16, 2, 6, 8]": ("odd", {"time_dim_concat": torch.zeros(1, 16, 2, 6, 8)}),
    "The conditioning has no text": ("text", {"text": None}),
    "The text has the shape [1, 7, 16]": ("text", {"text": torch.zeros(1, 7, 16)}),
    "The text has the shape [3, 7, 4096]": ("text", {"text": torch.zeros(3, 7, 4096)}),
    "The conditioning's text has NaN": ("text", {"text": torch.full((1, 7, 4096), torch.nan)}),
    "the input concat (20 further channels": ("text", {"concat": torch.zeros(1, 20, 3, 6, 8)}),
    "reads 20 further channels (the input concat), of the shape [1, 20, 3, 6, 8]; the conditioning has no such": (
        "image, 2.1", {"concat": None}),
    "the conditioning has the shape [1, 16, 3, 6, 8]": ("image, 2.1", {"concat": torch.zeros(1, 16, 3, 6, 8)}),
    "The latent has the shape [1, 48, 3, 6, 8]; this model needs [B,16,T,H,W]": ("text", {"channels": 48}),
    "both must be multiples of 2": ("hunyuan", {"size": (3, 5, 8)}),
    "the input ref_latent, which this model does not read. It comes from HunyuanImageToVideo": ("hunyuan", {
        "ref_latent": torch.zeros(1)}),
    "the input txt_byt5": ("hunyuan", {"txt_byt5": torch.zeros(1)}),
    "the input clip_fea, which this model does not read. HunyuanVideo reads an image through": ("hunyuan", {
        "clip_fea": torch.zeros(1)}),
    "no pooled vector (the input y)": ("hunyuan", {"y": None}),
    "a pooled vector of the shape [1, 20]": ("hunyuan", {"y": torch.zeros(1, 20)}),
    "guiding_frame_index, which replaces a frame (v2): [1.0]": ("hunyuan", {"guiding_frame_index": torch.ones(1)}),
    "attention_mask must be of integers": ("hunyuan", {"attention_mask": torch.ones(1, 7)}),
    "leave some to read": ("hunyuan", {"attention_mask": torch.zeros(1, 7, dtype=int)}),
    "be the same for all videos": ("hunyuan, batch", {"attention_mask": torch.tensor([[1] * 7, [0] + [1] * 6])}),
    "attention_mask has the shape [1, 6]": ("hunyuan", {"attention_mask": torch.ones(1, 6, dtype=int)}),
}  # fmt: skip


@pytest.mark.parametrize("says", WRONG)
def test_inputs_that_a_network_does_not_read_are_refused_by_name(conditioner, says):
    name, wrong = WRONG[says]
    case, tensors = CASES[name], dict(wrong)
    given = inputs_of(case._replace(size=tensors.pop("size", case.size)), **{"channels": None} | tensors)
    if "channels" in wrong:
        given = Inputs((1, wrong["channels"], *case.size), inputs_of(case).tensors)
    with pytest.raises(ValueError) as error:
        conditioner(case).check_inputs(given)
    assert says in str(error.value)


def test_what_a_network_reads_is_accepted_for_one_video_or_for_each(conditioner):
    for name in ("batch", "hunyuan, batch"):
        case = CASES[name]
        _, _, inputs = case.drawn(SEED)
        for given in (inputs, Inputs(inputs.shape, {key: x[:1] for key, x in inputs.tensors.items()})):
            conditioner(case).check_inputs(given)
            branch = conditioner(case).outer_branch(given, CPU, torch.float32)
            assert len(branch.text) == len(branch.timesteps(torch.tensor([400.0]))) == 2


def test_a_timestep_a_frame_that_is_the_same_for_all_is_one_a_video(conditioner):
    case = CASES["5B"]
    branch = conditioner(case).outer_branch(inputs_of(case), CPU, torch.float32)
    assert branch.timesteps(torch.full((1, 3), 250.0)).tolist() == [250.0]
    assert branch.timesteps(torch.tensor([[0.0, 250.0, 250.0]])).shape == (1, 3 * 3 * 4)
