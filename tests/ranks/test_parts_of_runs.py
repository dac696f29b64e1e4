"""Jobs that share the steps of a run: two in a row are the whole, on any number of ranks."""

import pytest
import torch
from ascend_runtime import AccelerationSpec, AttentionCacheSpec, DiffusionModelSpec, SampleSpec
from ascend_runtime.specs.jobs import SOLVERS
from msgspec.structs import replace
from torch.testing import assert_close

SHAPE = (1, 16, 3, 8, 8)
WHOLE = SampleSpec(seed=7, steps=5, guidance_scale=3.0, guidance_scale_low_noise=2.0, shift=5.0, solver="euler")


def sampled(runtime, model, specs, spec, latent=None, **options):
    latent = torch.zeros(SHAPE) if latent is None else latent
    return runtime.sample(model, spec, latent, specs.text(1), specs.text(2), **options)


def in_two(runtime, model, specs, whole, cut, with_history=True, latent=None, **options):
    """The two results of a run that is cut at a step."""
    spec = replace(whole, end_step=cut, leftover_noise=True)
    first = sampled(runtime, model, specs, spec, latent, **options)
    spec = replace(whole, start_step=cut, add_noise=False)
    history = first.tensors if with_history else None
    return first, sampled(runtime, model, specs, spec, first.tensor, history=history, **options)


@pytest.fixture
def two_experts(checkpoints, specs_of):
    specs = specs_of(checkpoints(experts=2))
    return DiffusionModelSpec(path=str(specs.folder)), specs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cut", [1, 3])
def test_two_jobs_are_one_with_two_experts(two_ranks, two_experts, solver, cut):
    """Whose boundary, 0.875, is before the third step of these five. The cut may be in either expert's steps."""
    model, specs = two_experts
    spec = replace(WHOLE, solver=solver)
    whole = sampled(two_ranks, model, specs, spec)
    first, second = in_two(two_ranks, model, specs, spec, cut)
    knows = {"unipc": "used", "dpm++": "used", "euler": None}[solver]  # which needs no earlier steps
    assert torch.equal(second.tensor, whole.tensor) and second.info.get("history") == knows
    assert (first.info["end step"], second.info["first step"], second.info["steps"]) == (cut, cut, 5)
    assert second.record.settings["noise added"] is False and first.record.settings["noise left"] is True
    _, alone = in_two(two_ranks, model, specs, spec, cut, with_history=False)
    apart = (alone.tensor - whole.tensor).abs().max()
    print(f"{solver}, cut at {cut}, by the latent only: {apart:.1e}")
    assert alone.info.get("history") == (knows and "missing") and (solver != "euler" or apart < 1e-5)


def test_two_jobs_share_the_schedule_of_an_accelerator(two_ranks, specs):
    """Its steps are those of the run. At a cut, what it kept is gone: a step that would reuse it is computed."""
    spec = replace(WHOLE, steps=8)
    cache = AccelerationSpec(attention_cache=AttentionCacheSpec(start=1, end=7, interval=3))
    reused = [2, 3, 5, 6]
    whole = sampled(two_ranks, specs.model, specs, spec, acceleration=cache)
    assert whole.info["acceleration"]["steps_reusing"] == reused
    for cut, again in ((4, []), (5, [5])):
        first, second = in_two(two_ranks, specs.model, specs, spec, cut, acceleration=cache)
        both = [one.info["acceleration"] for one in (first, second)]
        assert [step for one in both for step in one["steps_reusing"]] == [one for one in reused if one not in again]
        assert [len(one["seconds_a_step"]) for one in both] == [cut, 8 - cut]
        assert torch.equal(second.tensor, whole.tensor) is (not again)
        assert all(one["seen_speed_up"] > 0 for one in both)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_known_of_a_video_stays_known(two_ranks, specs, rng, solver):
    """It is handed on without noise. A half-known place is one only together with what the solver kept."""
    seed = rng.randrange(2**32)
    latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, 1, *SHAPE[2:])
    mask[:, :, 0], mask[..., 0] = 0, 0
    spec = replace(WHOLE, solver=solver)
    whole = sampled(two_ranks, specs.model, specs, spec, latent, noise_mask=mask)
    for with_history in (True, False):
        first, second = in_two(two_ranks, specs.model, specs, spec, 2, with_history, latent, noise_mask=mask)
        for one in (first, second):
            assert_close(torch.where(mask == 0, one.tensor, latent), latent, atol=1e-5, rtol=1e-5)
        if with_history or solver == "euler":
            assert_close(second.tensor, whole.tensor, atol=1e-4, rtol=1e-4)


def test_progress_counts_the_steps_of_the_job_and_a_plan_its_seconds(two_ranks, specs):
    steps = []
    spec = replace(WHOLE, steps=6, start_step=2, end_step=5)
    seen = {"on_progress": lambda stage, step, total: steps.append((step, total)) if stage == "denoise" else None}
    sampled(two_ranks, specs.model, specs, spec, **seen)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    specs_of_60 = replace(WHOLE, steps=60), replace(WHOLE, steps=60, start_step=20, end_step=30)
    whole, part = (two_ranks.plan(specs.model, one, torch.zeros(SHAPE)).seconds["denoise"] for one in specs_of_60)
    assert part < whole / 2


def test_what_cannot_be_is_refused(two_ranks, specs):
    with pytest.raises(ValueError, match="start_step is 9, but the run has 5 steps, 0 to 4"):
        sampled(two_ranks, specs.model, specs, replace(WHOLE, start_step=9))
    with pytest.raises(ValueError, match="start_step is 90, but the run has 50 steps"):  # the model's own number
        sampled(two_ranks, specs.model, specs, replace(WHOLE, steps=None, start_step=90))
    for history in ({"latent": 1}, {1: torch.zeros(1)}, [torch.zeros(1)]):
        with pytest.raises(ValueError, match="history"):
            sampled(two_ranks, specs.model, specs, WHOLE, history=history)
