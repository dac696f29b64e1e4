"""`plan --measure`: small jobs on real ranks, the profile that they leave, and what is predicted from it."""

import json
from contextlib import nullcontext

import pytest
from ascend_runtime.commands.measuring.measure import Subject, measure
from ascend_runtime.planner import models, rates, seconds
from ascend_runtime.planner.facts import Arrangement, Machine, Video
from ascend_runtime.planner.timing.profile import PROFILE, read_profile, rates_for
from ascend_runtime.specs import DiffusionModelSpec, Plan, VaeSpec

SHORT = 0.5  # seconds of jobs
AXES = {"cfg", "ulysses", "ring", "sequence", "tp", "fsdp"}


@pytest.fixture
def subject(checkpoints, runtimes, tmp_path):
    folder, vae = checkpoints(), VaeSpec(path=str(checkpoints()))
    model = models.read(DiffusionModelSpec(path=str(folder)), vae=vae, kind="cpu")
    return Subject(model, str(tmp_path), vae, "cpu", start=lambda number: nullcontext(runtimes(number)))


def test_measured_ranks_leave_a_profile_from_which_jobs_are_predicted(subject, tmp_path):
    said = []
    found = measure(subject, (2,), "cpu", SHORT, said.append)
    assert found == read_profile(tmp_path / PROFILE)
    (entry,) = found.entries
    assert (entry.kind, entry.card, entry.family, entry.ranks) == ("cpu", "cpu", "wan", 2) and entry.jobs > 20
    assert AXES | {"linear", "products", "merged", "decode", "copied", "read", "encode"} <= {*entry.costs, "read"}
    assert any(cost > 0 for cost in entry.costs.values()) and any("median error" in line for line in said)
    own = rates_for(str(tmp_path), "cpu", "cpu", "wan", 2)
    assert own.source.startswith("measured on this host with")
    video = Video((1, 16, 3, 16, 16), ((0, 2),) * 4, 64)
    machine = Machine("cpu", "cpu", 2, 2**33, 2**33)
    predicted = seconds.predicted(subject.model, video, Arrangement(Plan(cfg=2)), machine, own)
    assert 0 < predicted["denoise"] < 600 and predicted["denoise"] != seconds.predicted(
        subject.model, video, Arrangement(Plan(cfg=2)), machine, rates.of_card("cpu")
    )["denoise"]
    text = (tmp_path / PROFILE).read_text()
    assert str(tmp_path) not in text and set(json.loads(text)["entries"][0]) == {
        "kind", "card", "family", "ranks", "versions", "costs", "jobs", "error",
    }  # fmt: skip


def test_an_invalid_profile_is_refused_before_anything_runs(subject, tmp_path):
    (tmp_path / PROFILE).write_text("{")
    with pytest.raises(ValueError, match="not a profile of a host"):
        measure(subject, (2,), "cpu", SHORT, lambda line: pytest.fail(line))


def test_a_profile_that_could_not_be_kept_is_refused_before_anything_runs(subject, tmp_path):
    (tmp_path / f"{PROFILE}.partial").mkdir()  # as a folder without write permission, which root ignores
    with pytest.raises(ValueError, match="AV-1314.*cannot be written"):
        measure(subject, (2,), "cpu", SHORT, lambda line: pytest.fail(line))
