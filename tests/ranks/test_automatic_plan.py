"""What a user leaves open is chosen: the fastest plan that fits, on ranks whose memory is played."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ascend_runtime import DiffusionModelSpec, JobCancelled, ParallelSpec, RankError, SampleSpec, VideoSize
from ascend_runtime.client import choosing
from ascend_runtime.client.model_calls import NetworkPass
from ascend_runtime.engine import planning
from ascend_runtime.hardware import host, memory
from ascend_runtime.planner import choice, models, rates, videos
from ascend_runtime.planner import memory as planned_memory
from ascend_runtime.planner.choosing import encoders
from ascend_runtime.planner.facts import Arrangement, Machine
from ascend_runtime.specs import Plan
from ascend_runtime.wire.messages import SamplerRun
from ascend_runtime.wire.plans import Chosen, PlannedJob
from torch.testing import assert_close

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
SHAPE = (1, 16, 2, 4, 6)
STEPS = SampleSpec(seed=5, steps=2, shift=5.0)
PLENTY = 2**40
SET = ParallelSpec(ranks=2, cfg_degree=2, ring_degree=1, ulysses_degree=1, fsdp=False)


class Played:
    """Two ranks with the memory that a test sets, and the kinds of the messages that they get."""

    def __init__(self, folder, checkpoint, new_runtime, monkeypatch, specs_of):
        self._file = folder / "memory.json"
        self.model = DiffusionModelSpec(path=str(checkpoint), dtype="bfloat16")  # what is read is not mapped then
        self.text = specs_of(checkpoint).text
        self.has(PLENTY)
        path = os.pathsep.join([str(HELPERS / "played_memory"), str(HELPERS.parents[1]), *filter(None, sys.path)])
        self.runtime = new_runtime(2, PYTHONPATH=path, PLAYED_MEMORY=str(self._file))
        self.sent = []
        submit = self.runtime._submit
        monkeypatch.setattr(self.runtime, "_submit", lambda message, *rest: self._noted(submit, message, *rest))

    def _noted(self, submit, message, *rest):
        self.sent.append(message)
        return submit(message, *rest)

    def has(self, room, overflows=None):
        self._file.write_text(json.dumps({"room": room, "overflows": overflows}))

    def sample(self, shape=SHAPE, spec=STEPS, **options):
        """A sampling job, and the kinds of messages that it took."""
        self.sent.clear()
        return self.runtime.sample(self.model, spec, torch.zeros(shape), self.text(1), self.text(2), **options)

    @property
    def kinds(self):
        return [type(message).__name__ for message in self.sent]

    def peaks(self, shape=SHAPE):
        """The least bytes of a rank that are predicted, with whole weights and with shards."""
        found = _choice(self.model, shape)
        peak = lambda fsdp: min(p.memory.device_peak for p in found.fitting if p.arrangement.fsdp is fsdp)  # noqa: E731
        return peak(False), peak(True)


def _choice(spec, shape, fixed=choice.Fixed(tiles="whole", encoder="cpu")):
    model = models.read(spec, kind="cpu")
    planned = PlannedJob(model=spec, shape=shape, sample=STEPS)
    machine = Machine("cpu", "cpu", 2, PLENTY, 2 * PLENTY)
    return choice.choose(model, planning._video(model, planned), machine, rates.of_card("cpu"), fixed)


@pytest.fixture(scope="module")
def deep(checkpoints):
    """Two blocks are a small part of its weights."""
    return checkpoints(layers=24)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patched:
        yield patched


@pytest.fixture(scope="module")
def played(tmp_path_factory, deep, new_runtime, patch, specs_of):
    ranks = Played(tmp_path_factory.mktemp("played"), deep, new_runtime, patch, specs_of)
    yield ranks
    ranks.runtime.stop()


@pytest.fixture(autouse=True)
def fresh(request):
    if "played" in request.fixturenames:
        played = request.getfixturevalue("played")
        played.has(PLENTY)
        played.runtime.free()


def test_whole_weights_where_they_fit_and_shards_where_they_do_not(played):
    whole, shards = played.peaks()
    assert shards < whole
    fits = played.sample()
    assert "FSDP" not in fits.info["plan"]["line"] and played.sent[-1].parallel.fsdp is False
    played.runtime.free()
    played.has(whole - 1)
    tight = played.sample()
    chosen = played.sent[-1].parallel
    assert "FSDP" in tight.info["plan"]["line"] and chosen.fsdp is True
    assert tight.info["plan"]["device"] <= whole - 1
    set_by_hand = played.sample(parallel=chosen)
    assert torch.equal(tight.tensor, set_by_hand.tensor), "as if the user had set it"
    assert_close(tight.tensor, fits.tensor, atol=0.05, rtol=0.05)
    assert fits.tensor.std() > 0.1


def test_a_job_like_the_last_one_asks_nothing(played):
    played.sample()
    assert played.kinds == ["Choose", "Sample"]
    for seed in (6, 7):
        played.sample(spec=SampleSpec(seed=seed, steps=2, shift=5.0))
        assert played.kinds == ["Sample"]
    played.sample(shape=(1, 16, 3, 4, 6))
    assert played.kinds == ["Choose", "Sample"]
    played.sample()
    assert played.kinds == ["Sample"], "the weights are those of the job before"
    played.runtime.free()
    played.sample()
    assert played.kinds == ["Choose", "Sample"], "what memory there is now is not known"


def test_the_result_has_what_was_predicted_next_to_what_it_took(played):
    shown = []
    plan = played.sample(on_plan=shown.append).info["plan"]
    assert [one.line for one in shown] == [plan["line"]]
    assert {"load", "denoise"} <= plan["predicted"].keys() and {"load", "denoise"} <= plan["took"].keys()


def test_what_fits_in_no_way_is_refused_with_a_size_that_fits(played):
    size = VideoSize(width=256, height=256, num_frames=33)
    (_, shards), (_, least) = played.peaks(size.latent_shape()), played.peaks((1, 16, 2, 16, 16))
    assert least < shards
    played.has((least + shards) // 2)
    with pytest.raises(ValueError, match="AV-1210: ") as refused:
        played.sample(shape=size.latent_shape())
    assert played.kinds == ["Choose"], "nothing was read"
    numbers = re.findall(r"(\d+) x (\d+) with (\d+) frames", str(refused.value))
    assert tuple(map(int, numbers[0])) == (256, 256, 33) and len(numbers) > 1
    pids = played.runtime.pids
    for width, height, frames in numbers[1:]:
        smaller = VideoSize(width=int(width), height=int(height), num_frames=int(frames))
        assert played.sample(shape=smaller.latent_shape()).tensor.shape == smaller.latent_shape()
    assert played.runtime.pids == pids


def test_a_plan_can_be_asked_for_without_running_it(played):
    found = played.runtime.plan(played.model, STEPS, VideoSize(width=64, height=64, num_frames=5))
    assert found.parallel.cfg_degree * found.parallel.ulysses_degree == 2 and found.device > 0
    assert found.line.startswith("CFG 2") and "Predicted" in found.line
    played.sent.clear()
    played.has(1)
    with pytest.raises(ValueError, match="AV-1210"):
        played.runtime.plan(played.model, STEPS, torch.zeros(SHAPE))
    assert played.kinds == ["Choose"]


def test_what_the_user_has_set_stays(played):
    whole, _ = played.peaks()
    played.has(whole - 1)
    with pytest.raises(ValueError, match="AV-1210"):
        played.sample(parallel=ParallelSpec(ranks=2, fsdp=False))
    result = played.sample(parallel=SET)
    assert played.sent[-1].parallel == SET
    assert any("as it was set, though it is predicted not to fit" in text for text in result.info["warnings"])


def test_out_of_memory_has_one_more_try_with_a_plan_that_takes_less(played):
    played.has(PLENTY, overflows="whole")
    noticed, shown = [], []
    result = played.sample(on_notice=noticed.append, on_plan=shown.append)
    assert played.kinds == ["Choose", "Sample", "Free", "Choose", "Sample"]
    assert [message.parallel.fsdp for message in played.sent if hasattr(message, "latent")] == [False, True]
    assert len(noticed) == 1 and "once more" in noticed[0] and noticed[0] in result.info["warnings"]
    assert shown[1].device < shown[0].device
    played.sample()
    assert played.kinds == ["Sample"], "the next job begins with what worked"


def test_it_is_not_tried_twice(played):
    played.has(PLENTY, overflows="all")
    with pytest.raises(RankError, match="AV-1202"):
        played.sample()
    assert played.kinds.count("Sample") == 2
    with pytest.raises(RankError, match="AV-1202"):
        played.sample(parallel=SET)
    assert played.kinds.count("Sample") == 1, "no other plan was left open"


def test_a_cancel_ends_the_second_try_too(played):
    played.has(PLENTY, overflows="whole")
    with pytest.raises(JobCancelled):
        played.sample(on_notice=lambda text: played.runtime.cancel())
    assert played.kinds[-1] == "Sample" and played.runtime.alive
    played.has(PLENTY)
    assert played.sample().tensor.shape == SHAPE


def test_a_run_of_model_calls_keeps_its_plan(played):
    whole, _ = played.peaks()
    played.has(whole - 1)
    run, shown = SamplerRun(number=1, sigmas=(1.0, 0.5, 0.0)), []

    def call(step):
        played.sent.clear()
        latent, timesteps = torch.randn(SHAPE), torch.tensor([1000.0 * run.sigmas[step]])
        passes = [NetworkPass(branch, latent, timesteps, {"text": played.text(seed)})
                  for seed, branch in enumerate(("cond", "uncond"))]  # fmt: skip
        return played.runtime.velocity(played.model, passes, run, step, on_plan=shown.append)

    assert "FSDP" in call(0).info["plan"]["line"] and played.kinds == ["Choose", "Velocity"]
    played.has(PLENTY)
    assert "plan" not in call(1).info and played.kinds == ["Velocity"] and len(shown) == 1


def test_the_first_call_of_a_run_has_one_more_try(played):
    played.has(PLENTY, overflows="whole")
    run, latent = SamplerRun(number=2, sigmas=(1.0, 0.5)), torch.randn(SHAPE)
    passes = [NetworkPass("cond", latent, torch.tensor([1000.0]), {"text": played.text(1)})]
    played.sent.clear()
    result = played.runtime.velocity(played.model, passes, run, 0)
    assert played.kinds == ["Choose", "Velocity", "Free", "Choose", "Velocity"]
    assert "once more" in result.info["warnings"][-1] and played.sent[-1].setting.parallel.fsdp


def test_text_encoders_go_where_a_prompt_is_encoded_sooner_and_has_room(specs):
    (_, found), card = models.text_encoders(specs.encoder), rates.of_card("a2")
    needed = encoders.bytes_on_ranks(found, 8)
    whole = 2 * sum(math.prod(shape) for one in found for shape in one.shapes.values())
    assert needed > whole / 8

    def place(device, host, rates=card):
        return encoders.place(found, Machine("npu", "a2", 8, device, host), rates)

    assert place(needed, PLENTY) == "ranks"
    assert place(needed - 1, PLENTY) == "cpu", "no room on the cards"
    slow_ranks = replace(card, costs={**card.costs, "encode_ranks": 9 * card.costs["encode"]})
    assert place(needed, PLENTY, slow_ranks) == "cpu"
    assert place(needed, whole - 1, slow_ranks) == "ranks", "no room on the host"
    assert place(0, 0) == "cpu", "loading says what is missing"


def test_weights_on_the_ranks_are_used_where_reading_others_takes_longer(played):
    whole, _ = played.peaks()
    played.has(whole - 1)
    played.sample()
    assert played.sent[-1].parallel.fsdp
    played.has(PLENTY)
    played.sample(shape=(1, 16, 3, 4, 6))
    assert played.kinds == ["Choose", "Sample"] and played.sent[-1].parallel.fsdp, "both fit, and shards are here"


def test_out_of_memory_is_known_by_what_ranks_say(tmp_path):
    for text in ("NPU out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory", "MemoryError",
                 "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
                 f"Rank 1 of 2 was killed by SIGKILL, {host.BY_THE_KERNEL}. Its last output:"):  # fmt: skip
        assert host.out_of_memory(host.advise(text, "AV-1510")), text
    for text in ("Rank 0 of 2 was killed by SIGKILL. Its last output:", "No space left on device"):
        assert not host.out_of_memory(host.advise(text, "AV-1510")), text
    counts = tmp_path / "vmstat"
    assert memory.kills(counts) == 0
    counts.write_text("nr_free_pages 7\noom_kill 3\n")
    assert memory.kills(counts) == 3


def test_small_jobs_are_predicted_generously(specs):
    model, machine = models.read(specs.model, kind="cpu"), Machine("cpu", "cpu", 2, PLENTY, PLENTY)
    for size in (VideoSize(width=64, height=64, num_frames=9), VideoSize(width=256, height=256, num_frames=5)):
        video = videos.video_of(model, size, SampleSpec(steps=2))
        for fsdp in (False, True):
            exact, rough = (predict(model, video, Arrangement(Plan(ulysses=2), fsdp), machine).device["denoise"]["pass"]
                            for predict in (planned_memory.predicted, planned_memory.roughly))  # fmt: skip
            assert 0 < exact <= planning.NEGLIGIBLE * rough


class Asked:
    """What a second try asks the ranks for, which have no other plan."""

    def __init__(self, on_devices):
        self.on_devices, self.messages = on_devices, []

    def __call__(self, make):
        self.messages.append(make(1))
        return SimpleNamespace(info={"plan": None})

    def begin(self, sharded=False):
        pass

    def free(self):
        pass


@pytest.mark.parametrize(
    ("on_devices", "failure", "less"),
    [
        (True, "NPU out of memory. Tried to allocate 2.00 GiB", {"below": 900, "below_host": 0}),
        (True, "DefaultCPUAllocator: can't allocate memory: 2 bytes", {"below": 0, "below_host": 90}),
        (True, f"Rank 0 of 2 was killed by SIGKILL, {host.BY_THE_KERNEL}.", {"below": 0, "below_host": 90}),
        (False, "DefaultCPUAllocator: can't allocate memory: 2 bytes", {"below": 900, "below_host": 0}),
        (True, "a shape does not fit", None),
    ],
)
def test_a_second_try_takes_clearly_less_of_what_ran_out(on_devices, failure, less):
    jobs, planned = Asked(on_devices), PlannedJob(model=DiffusionModelSpec(path="model"))
    failed = Chosen(parallel=SET, experts="resident", line="a plan", computing=None, device=1000, host=100)
    assert choosing._next(jobs, choosing.Choices(), planned, failed, RankError(failure)) is None
    found = [{"below": message.below, "below_host": message.below_host} for message in jobs.messages]
    assert found == ([less] if less else [])


def test_a_plan_without_a_prediction_is_not_tried_again():
    jobs, planned = Asked(on_devices=True), PlannedJob(model=DiffusionModelSpec(path="model"))
    unknown = Chosen(parallel=SET, experts="resident", line="no plan was chosen", computing=None)
    assert choosing._next(jobs, choosing.Choices(), planned, unknown, RankError("NPU out of memory")) is None
    assert jobs.messages == []


def test_the_line_gives_the_reason_of_a_plan_that_is_not_the_fastest(checkpoint):
    model = DiffusionModelSpec(path=str(checkpoint))
    planned = PlannedJob(model=model, shape=SHAPE, sample=STEPS)
    machine = Machine("npu", "a2", 2, PLENTY, PLENTY)

    def line(holds, **below):
        known = planning.KnownModels(lambda spec: None)
        return planning.plan_for(planned, machine, known, holds, **below)

    fastest = line(lambda *_: False)
    held = line(lambda spec, tp, fsdp: fsdp)
    assert "the fastest" in fastest.line and not fastest.parallel.fsdp
    assert held.parallel.fsdp and "its weights are on the ranks, though CFG 2 fits and is faster" in held.line
    less = line(lambda *_: False, below=fastest.device)
    assert less.device < fastest.device and "it takes less, though CFG 2 fits and is faster" in less.line
