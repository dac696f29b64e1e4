"""A recording holds the steps that were asked for, on the rank that was asked for, and changes no result."""

import json
import logging
import re
from pathlib import Path

import pytest
import random_hunyuan
import torch
from ascend_runtime import DiffusionModelSpec, JobCancelled, ProfileSpec, SampleSpec
from ascend_runtime.client import runtime as client
from ascend_runtime.client.submission import Result

SHAPE = (1, 16, 2, 4, 6)
SPEC = SampleSpec(seed=1, steps=5, guidance_scale=3.0)
LAYERS = 2


def sample(runtime, specs, spec=SPEC, **options):
    return runtime.sample(specs.model, spec, torch.zeros(SHAPE), specs.text(1), specs.text(2), **options)


def trace_of(folder: str) -> dict:
    """The one Chrome trace of a recording."""
    (file,) = Path(folder).iterdir()
    assert file.name.endswith(".pt.trace.json"), "the name by which TensorBoard knows it"
    return json.loads(file.read_text())


def names(trace: dict) -> list[str]:
    return [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]


def steps_in(trace: dict) -> list[int]:
    """The steps that are marked in a trace, in order."""
    marks = [event for event in trace["traceEvents"] if re.fullmatch(r"step \d+", event.get("name", ""))]
    return [int(mark["name"].split()[1]) for mark in sorted(marks, key=lambda mark: mark["ts"])]


@pytest.mark.parametrize("ranks, rank, first, last", [(1, 0, 2, 2), (1, 0, 1, 5), (2, 0, 2, 3), (2, 1, 4, 5)])
def test_it_holds_these_steps_of_this_rank(runtimes, specs, tmp_path, ranks, rank, first, last):
    profile = ProfileSpec(folder=str(tmp_path / "new" / "folder"), first_step=first, last_step=last, rank=rank)
    plain = sample(runtimes(ranks), specs)
    recorded = sample(runtimes(ranks), specs, profile=profile)
    assert torch.equal(recorded.tensor, plain.tensor) and "profile" not in plain.info
    (folder,) = Path(profile.folder).iterdir()
    assert recorded.info["profile"] == str(folder) and folder.name.endswith(f"_rank{rank}")
    trace = trace_of(folder)
    wanted = list(range(first, last + 1))
    assert steps_in(trace) == wanted
    branches = 2 // ranks  # two ranks take one each
    attentions = names(trace).count("aten::scaled_dot_product_attention")
    assert attentions == 2 * LAYERS * branches * len(wanted), "self and cross, and of no other step"
    if ranks > 1:
        assert trace["distributedInfo"]["rank"] == rank


def test_steps_of_hunyuan_video_are_recorded(two_ranks, tmp_path):
    """Also on a rank whose tokens are all of the text."""
    model = DiffusionModelSpec(path=str(random_hunyuan.folder(tmp_path)))
    profile = ProfileSpec(folder=str(tmp_path / "new"), first_step=2, last_step=3, rank=1)
    result = two_ranks.sample(model, SampleSpec(seed=1, steps=3), torch.zeros(SHAPE),
                              random_hunyuan.conditioning(text=17), profile=profile)  # fmt: skip
    trace = trace_of(result.info["profile"])
    assert steps_in(trace) == [2, 3] and trace["distributedInfo"]["rank"] == 1
    blocks, refiner = 4, 2
    assert names(trace).count("aten::scaled_dot_product_attention") == 2 * (blocks + refiner)


def test_every_recording_has_a_folder_of_its_own(one_rank, specs, tmp_path):
    profile = ProfileSpec(folder=str(tmp_path))
    folders = [sample(one_rank, specs, profile=profile).info["profile"] for _ in range(2)]
    assert sorted(map(str, tmp_path.iterdir())) == sorted(set(folders)) and len(set(folders)) == 2
    assert [steps_in(trace_of(folder)) for folder in folders] == [[2], [2]]


def test_it_ends_with_the_job(one_rank, specs, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        result = sample(one_rank, specs, profile=ProfileSpec(folder=str(tmp_path), first_step=4, last_step=9))
    assert steps_in(trace_of(result.info["profile"])) == [4, 5]
    assert "ends with step 5" in caplog.text and "not with step 9" in caplog.text
    assert f"Recorded steps 4 to 5 on rank 0: {result.info['profile']}" in caplog.text


def test_steps_may_be_given_as_sigmas(one_rank, specs, tmp_path):
    spec = SampleSpec(seed=1, steps=1, sigmas=(1.0, 0.8, 0.4, 0.0))
    result = sample(one_rank, specs, spec, profile=ProfileSpec(folder=str(tmp_path), first_step=3, last_step=3))
    assert steps_in(trace_of(result.info["profile"])) == [3]


def test_a_warm_up_is_not_recorded(one_rank, specs, tmp_path):
    one_rank.free()
    result = sample(one_rank, specs, warm_up=True, profile=ProfileSpec(folder=str(tmp_path), first_step=1))
    assert "warm up" in result.seconds
    assert steps_in(trace_of(result.info["profile"])) == [1, 2]


@pytest.mark.parametrize("given, says", [
    ({"first_step": 6, "last_step": 6}, ["first_step is 6", "the job has 5", "from 1 to 5"]),
    ({"rank": 1}, ["rank is 1", "1 rank(s)"]),
])  # fmt: skip
def test_what_cannot_be_recorded_is_refused_before_anything_runs(new_runtime, specs, tmp_path, given, says):
    with new_runtime(1) as runtime:
        profile = ProfileSpec(folder=str(tmp_path / "none"), **given)
        error = str(pytest.raises(ValueError, sample, runtime, specs, profile=profile).value)
        assert not runtime.alive and list(tmp_path.iterdir()) == []
    assert not [word for word in says if word not in error], error


@pytest.mark.parametrize("given, says", [
    ({"first_step": 0}, "first_step is 0"),
    ({"first_step": 3, "last_step": 2}, "last_step is 2"),
    ({"rank": -1}, "rank is -1"),
])  # fmt: skip
def test_descriptions(given, says):
    with pytest.raises(ValueError, match=says):
        ProfileSpec(folder="x", **given)


def test_a_folder_that_cannot_be_made(two_ranks, specs, tmp_path):
    """Only rank 1 finds out; the other must not wait for it in an exchange."""
    (tmp_path / "file").touch()
    pids = two_ranks.pids
    for folder in ("file", "file/folder"):
        with pytest.raises(ValueError, match="Give another folder"):
            sample(two_ranks, specs, profile=ProfileSpec(folder=str(tmp_path / folder), rank=1))
    assert sample(two_ranks, specs).tensor.std() > 0.1 and two_ranks.pids == pids


@pytest.mark.parametrize("cancel_at, kept", [(2, False), (4, True)])
def test_a_cancelled_job_closes_the_recording(two_ranks, checkpoints, specs_of, tmp_path, cancel_at, kept):
    """Inside its steps it is thrown away, after them it is there already; and the next job can record again."""
    specs = specs_of(checkpoints(layers=24))  # whose steps take longer than a cancel
    spec = SampleSpec(seed=1, steps=40, guidance_scale=3.0)
    last = 3 if kept else 40
    profile = ProfileSpec(folder=str(tmp_path), first_step=1, last_step=last, rank=1)
    with pytest.raises(JobCancelled):
        sample(two_ranks, specs, spec, profile=profile,
               on_progress=lambda stage, step, total: stage == "denoise" and step == cancel_at and two_ranks.cancel())
    folders = list(tmp_path.iterdir())
    assert [steps_in(trace_of(folder)) for folder in folders] == ([[1, 2, 3]] if kept else [])
    again = sample(two_ranks, specs, SPEC, profile=ProfileSpec(folder=str(tmp_path), rank=1))
    assert steps_in(trace_of(again.info["profile"])) == [2]


def test_a_profiler_that_fails_in_silence_is_told_of(caplog):
    """torch_npu's catches its own errors, and writes nothing then."""
    profile = ProfileSpec(folder="/profiles", rank=1)
    client._log_extras(Result(info={"cfg_degree": 1}), profile)
    assert "not written a recording of steps 2 to 2 on rank 1" in caplog.text
