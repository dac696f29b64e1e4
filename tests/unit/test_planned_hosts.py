"""Simulated cards and hosts: every workflow of the pack fits automatically and shows its numbers, or is refused with
the nearest sizes that fit."""

import json
import random
import re
from pathlib import Path

import pytest
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize
from ascend_runtime.planner import choice, memory, models, rates, videos
from ascend_runtime.planner.choice import Fixed
from ascend_runtime.planner.choosing import words
from ascend_runtime.planner.choosing.arrangements import arrangements, open_tiles
from ascend_runtime.planner.choosing.sizes import pictures, video_size
from ascend_runtime.planner.facts import Machine
from ascend_runtime.specs.plans import AXES
from msgspec.structs import replace
from scripts.lib.predictions import MODELS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
CARDS = [("a2", 8, 64), ("a3", 16, 64), ("a2", 4, 32), ("h100", 2, 80)]  # card, number, GB of each
HOSTS = (64, 256, 1024)  # GB
LOADERS = {"model_name": ("AscendLoadDiffusionModel",), "unet_name": ("AscendUNETLoader",)}
SEED = random.randrange(2**32)


def nodes_of(workflow):
    return [(node["class_type"], node["inputs"]) for node in json.loads(workflow.read_text()).values()]


def file_of(nodes):
    """The first transformer's file."""
    (key, *_) = [key for key in ("model_name", "unet_name") for name, _ in nodes if name in LOADERS[key]]
    return next(inputs[key] for name, inputs in nodes if name in LOADERS[key])


def published_name(file):
    (name,) = {name for begin, name in MODELS.items() if file.startswith(begin)}
    return name


def model_of(nodes, kind):
    file = file_of(nodes)
    quantization = dict(nodes).get("AscendLoadDiffusionModel", {}).get("quantization", "none")
    if not file.startswith("embedded/"):
        stored = models.IN_8_BITS if "fp8" in file else models.IN_16_BITS
        return models.published(published_name(file), kind, quantization, stored)
    path = str(ROOT / "assets" / "tiny_wan")
    spec = DiffusionModelSpec(path=path, quantization=quantization)
    return models.read(spec, TextEncoderSpec(path=path), VaeSpec(path=path), kind)


def asked(workflow, kind):
    """(model, video, what is fixed) of a workflow."""
    nodes = nodes_of(workflow)
    model = model_of(nodes, kind)
    given = next(inputs for _, inputs in nodes if isinstance(inputs.get("width"), int))
    if "seconds" in given:
        size = VideoSize.of_seconds(**given)
    else:
        size = VideoSize(width=given["width"], height=given["height"], num_frames=given["length"])
    sampler = next(inputs for _, inputs in nodes if "steps" in inputs)
    sample = SampleSpec(steps=sampler["steps"] or None, guidance_scale=sampler["cfg"] or None)
    video = videos.video_of(model, size, sample, from_image=any(name == "LoadImage" for name, _ in nodes))
    plan = dict(nodes)["AscendParallelConfig"]
    degrees = {f"{axis}_degree": plan[f"{axis}_degree"] for axis in AXES}
    parallel = ParallelSpec(fsdp=plan["fsdp"] or None, **degrees)
    return model, video, Fixed(parallel, tiles=dict(nodes).get("AscendLoadVAE", {}).get("tiles", "auto"))


def machine(card, ranks, device, host):
    """GB. 5 % of a card's memory is the driver's."""
    kind = rates.CARD_FIGURES[card].kind
    communicator = 400 * 2**20 if kind == "npu" else 0
    return Machine(kind, card, ranks, int(0.95e9 * device), int(1e9 * host), communicator)


def fits(model, video, on, fixed, size=None):
    if size is not None:
        video = videos.resized(model, video, size)
    return any(
        choice.fits(memory.predicted(model, video, one, on), on)
        for tiles in open_tiles(model, on, fixed) for one in arrangements(model, video, on, fixed, tiles)
    )  # fmt: skip


def check(model, video, on, fixed):
    """Fits with numbers, or is refused with sizes that fit, next to which larger ones do not. Returns whether it
    fits."""
    try:
        made = choice.choose(model, video, on, rates.of_card(on.card), fixed)
    except ValueError as error:
        check_refusal(str(error), model, video, on, fixed)
        return False
    chosen = made.chosen
    assert choice.fits(chosen.memory, on) and chosen.seconds["denoise"] > 0
    assert all(fixed_degree in (0, own) for fixed_degree, own in (
        (fixed.parallel.ulysses_degree, chosen.arrangement.plan.ulysses), (fixed.parallel.tp_degree,
                                                                           chosen.arrangement.plan.tp)))  # fmt: skip
    assert fixed.parallel.fsdp is None or chosen.arrangement.fsdp
    assert words.gigabytes(chosen.memory.device_peak) in made.line and "Predicted: " in made.line
    assert "published figures" in made.line and "not measured here" in made.line and "\n" not in made.line
    return True


def check_refusal(text, model, video, on, fixed):
    assert text.startswith("AV-1210: ")
    form = model.family.form(model.experts[0].config)
    own = video_size(video, form)
    by_frames, by_picture = choice.nearest_sizes(model, video, on, fixed)
    named = {(one.width, one.height, one.num_frames) for one in (by_frames, by_picture) if one}
    sizes = re.findall(r"(\d+) x (\d+) with (\d+) frames?(?= or|\.)", text)
    assert named == {tuple(map(int, found)) for found in sizes}
    assert named or "No size fits" in text
    if by_frames:
        assert fits(model, video, on, fixed, by_frames) and by_frames.num_frames < own.num_frames
        assert not fits(model, video, on, fixed, replace(by_frames, num_frames=by_frames.num_frames + form.temporal))
    if by_picture:
        larger = pictures(own, form)[pictures(own, form).index(by_picture) - 1]
        assert fits(model, video, on, fixed, by_picture) and not fits(model, video, on, fixed, larger)


def test_every_workflow_fits_or_is_refused_with_the_nearest_size(pytestconfig):
    print("seed", SEED)
    everything = pytestconfig.getoption("--all-hosts")
    drawn = random.Random(SEED)
    for workflow in WORKFLOWS if everything else drawn.sample(WORKFLOWS, 1):
        for card, ranks, device in CARDS if everything else drawn.sample(CARDS, 2):
            made = asked(workflow, rates.CARD_FIGURES[card].kind)
            for host in HOSTS:
                model, video, fixed = made
                does = check(model, video, machine(card, ranks, device, host), fixed)
                print(workflow.name, card, ranks, device, host, "fits" if does else "refused")


def test_every_workflow_has_a_published_model():
    files = {file_of(nodes_of(workflow)) for workflow in WORKFLOWS}
    assert len(files) > 9
    assert {published_name(file) for file in files if not file.startswith("embedded/")} == set(models.names())


def test_a_video_that_is_too_large_is_refused_with_the_nearest_sizes():
    model = models.published("Wan2.1-T2V-1.3B")
    video = videos.video_of(model, VideoSize(width=1280, height=720, num_frames=81))
    assert not check(model, video, machine("a2", 1, 7, 64), Fixed())


def test_weights_that_do_not_fit_are_refused_without_a_size():
    model, on = models.published("Wan2.1-T2V-1.3B"), machine("a2", 1, 2, 32)
    video = videos.video_of(model, VideoSize(width=64, height=64, num_frames=1))
    with pytest.raises(ValueError, match="AV-1210: .*No size fits: the weights do not"):
        choice.choose(model, video, on, rates.of_card("a2"))
    assert choice.nearest_size(model, video, on) is None
