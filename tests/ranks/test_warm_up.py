"""A warm-up runs both experts before the first job of its kind, changes no result, and is not made twice."""

import logging
import shutil

import pytest
import random_hunyuan
import torch
import torch.distributed as dist
from ascend_runtime import (
    AccelerationSpec,
    Conditioning,
    DiffusionModelSpec,
    JobCancelled,
    OperatorSpec,
    ParallelSpec,
    RainFusionSpec,
    SampleSpec,
)
from ascend_runtime.wire import messages
from ascend_runtime.engine.job import Job
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.wire.channel import Channel, channel_pair

SHAPE = (1, 16, 2, 4, 6)
SPEC = SampleSpec(seed=1, steps=3, guidance_scale=3.0, shift=12.0)
PLANS = {"1 rank": (1, None), "cfg 2": (2, ParallelSpec(ranks=2, cfg_degree=2)),
         "Ulysses 2": (2, ParallelSpec(ranks=2, ulysses_degree=2))}  # fmt: skip


@pytest.fixture
def own(checkpoints, specs_of, tmp_path):
    """A checkpoint with two experts that is this test's alone, so that nothing is warm."""
    return specs_of(shutil.copytree(checkpoints(experts=2), tmp_path / "own"))


def sample(runtime, specs, *, spec=SPEC, shape=SHAPE, tokens=512, warm_up=True, **options):
    texts = [specs.text(seed)[:, :tokens] for seed in (1, 2)]
    return runtime.sample(specs.model, spec, torch.zeros(shape), *texts, warm_up=warm_up, **options)


def warms_up(runtime, specs, **options) -> bool:
    return "warm up" in sample(runtime, specs, **options).seconds


@pytest.mark.parametrize("plan", PLANS)
def test_the_result_is_the_same_to_the_bit(runtimes, own, plan, caplog):
    ranks, parallel = PLANS[plan]
    told = []
    with caplog.at_level(logging.INFO):
        warmed = sample(runtimes(ranks), own, parallel=parallel, on_progress=lambda *news: told.append(news))
    assert [news for news in told if news[0] != "load"] == [
        ("warm up", 1, 2), ("warm up", 2, 2), ("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3)
    ]  # fmt: skip
    assert set(warmed.seconds) == {"load", "warm up", "denoise"} and warmed.seconds["warm up"] > 0
    assert f"warm-up took {warmed.seconds['warm up']:.1f} s" in caplog.text
    runtimes(ranks).free()
    cold = sample(runtimes(ranks), own, parallel=parallel, warm_up=False)
    assert set(cold.seconds) == {"load", "denoise"}
    assert torch.equal(warmed.tensor, cold.tensor) and cold.tensor.std() > 0.1


def test_what_is_warm_and_what_is_not(two_ranks, own):
    assert warms_up(two_ranks, own)
    assert not warms_up(two_ranks, own)
    same_kind = SampleSpec(seed=2, steps=2, guidance_scale=4.0, solver="euler", schedule="simple")
    assert not warms_up(two_ranks, own, spec=same_kind)
    for change in (
        {"shape": (1, 16, 2, 6, 4)},
        {"shape": (2, *SHAPE[1:])},
        {"tokens": 64},
        {"parallel": ParallelSpec(ranks=2, ulysses_degree=2)},
        {"operators": OperatorSpec(heads_per_call=1)},
        {"spec": SampleSpec(steps=2, guidance_scale=1.0)},
    ):
        assert warms_up(two_ranks, own, **change), change
        assert not warms_up(two_ranks, own, **change), change
    assert not warms_up(two_ranks, own), "the first kind is still warm"


def test_which_jobs_of_hunyuan_video_are_warm(two_ranks, tmp_path):
    """The length of the text is a part of the shapes; the value of the embedded guidance is not."""
    model = DiffusionModelSpec(path=str(random_hunyuan.folder(tmp_path)))

    def made(text=7, negative=None, warm_up=True, **changes):
        spec = SampleSpec(**{"seed": 1, "steps": 2, **changes})
        prompts = [random_hunyuan.conditioning(text=n) for n in (text, negative) if n]
        return two_ranks.sample(model, spec, torch.zeros(SHAPE), *prompts, warm_up=warm_up)

    first = made()
    assert "warm up" in first.seconds
    for same in ({}, {"seed": 2, "embedded_guidance": 3.0}, {"steps": 3}):
        assert "warm up" not in made(**same).seconds, same
    for change in ({"text": 8}, {"guidance_scale": 3.0, "negative": 7}):
        assert "warm up" in made(**change).seconds and "warm up" not in made(**change).seconds, change
    two_ranks.free()
    assert torch.equal(made(warm_up=False).tensor, first.tensor) and first.tensor.std() > 0.1


def test_a_model_that_is_loaded_again_is_cold(two_ranks, own):
    assert warms_up(two_ranks, own)
    two_ranks.free()
    assert warms_up(two_ranks, own)


def test_a_cancelled_warm_up_is_begun_anew(two_ranks, checkpoints, specs_of):
    own = specs_of(checkpoints(layers=24))  # whose steps take longer than a cancel
    expected = sample(two_ranks, own, warm_up=False).tensor
    told = []

    def on_progress(*news):
        told.append(news)
        if news[0] == "warm up":
            two_ranks.cancel()

    with pytest.raises(JobCancelled):
        sample(two_ranks, own, on_progress=on_progress)
    assert told[-1][0] == "warm up"
    again = sample(two_ranks, own)
    assert "warm up" in again.seconds and torch.equal(again.tensor, expected)


def test_it_sends_no_pictures(one_rank, own):
    steps = []
    assert warms_up(one_rank, own, on_preview=lambda step, total, image: steps.append((step, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def alone():
    """A group that has this process as its only rank, and a control connection."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ours, theirs = channel_pair()
    theirs = Channel(theirs)
    with torch.no_grad():
        yield ours
    theirs.close()
    ours.close()
    mesh_of.cache_clear()
    dist.destroy_process_group()


@pytest.mark.parametrize("boundary, calls", [
    (None, ["high", "high", "low", "low", "high", "high"]),
    (1.0, ["high", "high", "low", "low", "low", "low"]),  # the job's own step is at 999 of 1000
    (0.0, ["high"] * 6),  # below 0 there is nothing to do for the low-noise expert
])  # fmt: skip
def test_both_experts_run_in_it(alone, checkpoints, specs_of, boundary, calls):
    """Each computes both branches, before the one step of the job."""
    specs = specs_of(checkpoints(experts=2))
    pipeline, called = RankPipeline(torch.device("cpu")), []
    specs.model = DiffusionModelSpec(path=str(specs.folder), boundary=boundary)
    model = pipeline.components.get(specs.model, lambda done, total: None)
    for name, expert in (("high", model.high_noise), ("low", model.low_noise)):
        expert.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    message = messages.Sample(
        job=1, model=specs.model, parallel=ParallelSpec(), spec=SampleSpec(steps=1, guidance_scale=3.0),
        latent=torch.zeros(SHAPE), warm_up=True,
        positive=Conditioning(text=specs.text(1)), negative=Conditioning(text=specs.text(2)),
    )  # fmt: skip
    done = pipeline.sample(Job(message, alone, torch.device("cpu")))
    assert "warm up" in done.seconds
    assert called == calls


@pytest.mark.parametrize("sigmas, expert", [((1.0, 0.9), "high"), ((0.5, 0.25, 0.0), "low")])
def test_attention_begins_dense_and_sparse_also_for_a_job_of_one_expert(alone, checkpoints, specs_of, sigmas, expert):
    """A schedule cut in two has the other expert in the warm-up alone."""
    specs = specs_of(checkpoints(experts=2))
    pipeline, attended = RankPipeline(torch.device("cpu")), []
    model = pipeline.components.get(specs.model, lambda done, total: None)
    for name, network in (("high", model.high_noise), ("low", model.low_noise)):
        network.blocks[0].attn1.register_forward_pre_hook(
            lambda _, given, name=name: attended.append((name, "dense" if given[2] is None else "sparse"))
        )
    message = messages.Sample(
        job=1, model=specs.model, parallel=ParallelSpec(), latent=torch.zeros(SHAPE), warm_up=True,
        spec=SampleSpec(sigmas=sigmas, guidance_scale=1.0, guidance_scale_low_noise=1.0),
        acceleration=AccelerationSpec(rainfusion=RainFusionSpec(start=0)),
        positive=Conditioning(text=specs.text(1)), negative=None,
    )  # fmt: skip
    pipeline.sample(Job(message, alone, torch.device("cpu")))
    assert attended[:2] == [("high", "dense"), ("low", "sparse")]
    assert set(attended[2:]) == {(expert, "sparse")} and len(attended) == len(sigmas) + 1
