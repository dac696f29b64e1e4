"""Sigmas and solvers against a case whose answer is known: normally distributed videos.

For clean latents of mean m and standard deviation s, the velocity is known in closed form, and the flow from the
noise n ends at m + s n.
"""

import math

import numpy as np
import pytest
import tiny_models
import torch
from ascend_runtime import SampleSpec
from ascend_runtime.engine.sampling import (
    Watch,
    denoise,
    handed_on,
    history_of,
    make_scheduler,
    noise_of,
    noisy,
    resumed,
    simple_sigmas,
    stepped_through,
)
from ascend_runtime.models.registry import family
from ascend_runtime.specs.jobs import OWN, SIMPLE, SOLVERS
from msgspec.structs import replace
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

SHAPE = (1, 16, 2, 4, 4)
MEAN, DEVIATION, SHIFT = 0.4, 0.7, 3.0


def deviation_at(sigma):
    """Standard deviation of (1 - sigma) x + sigma n."""
    return math.hypot((1 - sigma) * DEVIATION, sigma)


def velocity(latent, timestep, step):
    """E[n - x | latent], the exact prediction for normally distributed videos."""
    sigma = timestep / 1000
    deviation = (latent - (1 - sigma) * MEAN) / deviation_at(sigma) ** 2
    return sigma * deviation - (MEAN + (1 - sigma) * DEVIATION**2 * deviation)


def denoised(spec, latent=None, **hooks):
    start = noisy(torch.zeros(SHAPE) if latent is None else latent, spec)
    return denoise(velocity, tiny_models.scheduler(spec), start, **hooks)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", [OWN, SIMPLE])
def test_solvers_reach_the_known_end(solver, schedule):
    spec = SampleSpec(seed=5, steps=40, solver=solver, schedule=schedule, shift=SHIFT)
    latent = denoised(spec)
    expected = MEAN + DEVIATION * noise_of(SHAPE, 5)
    assert_close(latent, expected, atol=0.15 if solver == "euler" else 0.03, rtol=0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_reach_the_known_end_with_hunyuan_videos_schedule(solver):
    spec = SampleSpec(seed=5, steps=60, solver=solver, shift=7.0)
    latent = denoise(velocity, make_scheduler(spec, family("hunyuan_video")), noisy(torch.zeros(SHAPE), spec))
    expected = MEAN + DEVIATION * noise_of(SHAPE, 5)
    assert_close(latent, expected, atol=0.15 if solver == "euler" else 0.03, rtol=0.0)


@pytest.mark.parametrize("steps, shift", [(50, 7.0), (20, 17.0), (7, 2.0), (1, 7.0)])
def test_hunyuan_videos_schedule_is_that_of_diffusers_pipeline(steps, shift):
    """To the bit. Core's schedule "simple" takes the same sigmas where the steps divide 1000."""
    own, theirs = family("hunyuan_video"), FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    ours = make_scheduler(SampleSpec(steps=steps, shift=shift, solver="euler"), own)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    within = 1e-6 if 1000 % steps == 0 else 3e-3
    assert_close(torch.tensor(simple_sigmas(steps, shift)), ours.sigmas, atol=within, rtol=0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_are_nearer(solver):
    expected = MEAN + DEVIATION * noise_of(SHAPE, 5)
    specs = [SampleSpec(seed=5, steps=steps, solver=solver, shift=5.0) for steps in (5, 20, 80)]
    errors = [(denoised(spec) - expected).abs().max() for spec in specs]
    assert errors[0] > 2 * errors[1] and errors[1] > 2 * errors[2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_sigmas_may_begin_late_and_end_early(solver):
    """Noise is mixed into the latent given; the end is scaled as core ComfyUI hands it to the next sampler."""
    first, last = 0.8, 0.2
    sigmas = tuple(torch.linspace(first, last, 40, dtype=torch.float64).tolist())
    clean = MEAN + DEVIATION * noise_of(SHAPE, 6)
    latent = denoised(SampleSpec(seed=5, solver=solver, sigmas=sigmas, shift=5.0), clean)
    mixed = (1 - first) * clean + first * noise_of(SHAPE, 5)
    whitened = (mixed - (1 - first) * MEAN) / deviation_at(first)
    expected = ((1 - last) * MEAN + deviation_at(last) * whitened) / (1 - last)
    assert_close(latent, expected, atol=0.15 if solver == "euler" else 0.03, rtol=0.0)


def part_of(spec, latent, history={}):
    """What a job makes of a part of a run: (latent, history)."""
    scheduler, steps = tiny_models.scheduler(spec), spec.computed_steps
    start = resumed(history, spec.solver, scheduler, latent.shape, steps.start)
    if start is None:
        start = noisy(latent, spec, sigma=float(scheduler.sigmas[steps.start]) if steps.start else None)
    end = stepped_through(velocity, scheduler, start, steps)
    kept = history_of(spec.solver, scheduler, end, steps.stop)
    return handed_on(end, float(scheduler.sigmas[steps.stop])), kept


def cut_in_two(cut, with_history, **settings):
    first = SampleSpec(seed=5, end_step=cut, leftover_noise=True, **settings)
    latent, history = part_of(first, torch.zeros(SHAPE))
    second = SampleSpec(seed=6, start_step=cut, add_noise=False, **settings)
    return part_of(second, latent, history if with_history else {})[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", [OWN, SIMPLE])
@pytest.mark.parametrize("cut", [1, 2, 7, 11])
def test_two_parts_of_a_run_are_the_whole(solver, schedule, cut):
    settings = {"steps": 12, "solver": solver, "schedule": schedule, "shift": SHIFT}
    whole = denoised(SampleSpec(seed=5, **settings))
    assert torch.equal(cut_in_two(cut, True, **settings), whole)
    begun_again = (cut_in_two(cut, False, **settings) - whole).abs().max()
    print(f"without what the solver kept: {begun_again:.1e}")
    assert begun_again < (1e-5 if solver == "euler" else 0.2)
    assert cut != 7 or solver == "euler" or begun_again > 1e-4


def test_what_another_solver_schedule_size_or_step_has_kept_is_not_used():
    spec = SampleSpec(seed=5, steps=8, end_step=3, leftover_noise=True, solver="unipc", schedule=SIMPLE, shift=SHIFT)
    _, kept = part_of(spec, torch.zeros(SHAPE))

    def is_used(history=kept, solver="unipc", shape=SHAPE, step=3, **changes):
        scheduler = tiny_models.scheduler(replace(spec, solver=solver, **changes))
        return resumed(history, solver, scheduler, shape, step) is not None

    assert is_used() and is_used(end_step=5, leftover_noise=False)
    assert not any(map(is_used, ({}, kept | {"output 1": torch.zeros(2)}, kept | {"latent": torch.zeros(1)})))
    assert not (is_used(solver="dpm++") or is_used(shape=(1, 16, 2, 4, 5)) or is_used(step=2) or is_used(shift=9.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_that_is_ended_early_goes_down_to_no_noise(solver):
    """Its last step is that of a run with sigma 0 in its place."""
    spec = SampleSpec(seed=5, steps=12, end_step=4, solver=solver, schedule=SIMPLE, shift=SHIFT)
    sigmas = simple_sigmas(12, SHIFT)[:4] + (0.0,)
    expected = denoised(SampleSpec(seed=5, solver=solver, sigmas=sigmas, shift=SHIFT))
    assert_close(part_of(spec, torch.zeros(SHAPE))[0], expected, atol=1e-6, rtol=0.0)


def test_a_latent_of_zeros_without_noise_stays_one():
    """As in core ComfyUI, where it begins as zeros at any step."""
    for start in (0, 2):
        spec = SampleSpec(steps=4, start_step=start, add_noise=False, schedule=SIMPLE, shift=SHIFT, solver="euler")
        assert not noisy(torch.zeros(SHAPE), spec, sigma=0.5).any()


@pytest.mark.parametrize("changes, says", [
    ({"start_step": 3, "end_step": 3}, "start_step is 3 and end_step is 3, which leaves no step"),
    ({"start_step": -1}, "start_step is -1"),
    ({"end_step": 10_001}, "end_step is 10001"),
    ({"image_start": True, "add_noise": False}, "image_start .* add_noise is False"),
])  # fmt: skip
def test_parts_of_a_run_that_do_not_exist_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        SampleSpec(**changes)
    with pytest.raises(ValueError, match="start_step is 5, but the run has 4 steps, 0 to 3"):
        SampleSpec(steps=4, start_step=5).computed_steps


def test_schedule_simple_takes_every_nth_of_a_thousand_shifted_sigmas():
    shifted = [SHIFT * t / (1000 + (SHIFT - 1) * t) for t in range(1, 1001)]
    assert simple_sigmas(4, SHIFT) == pytest.approx([shifted[999], shifted[749], shifted[499], shifted[249], 0.0])
    assert simple_sigmas(3, SHIFT) == pytest.approx([shifted[999], shifted[666], shifted[333], 0.0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_sigmas_win_over_steps_schedule_and_shift(solver):
    sigmas = (1.0, 0.7, 0.3, 0.0)
    scheduler = tiny_models.scheduler(SampleSpec(solver=solver, sigmas=sigmas, steps=50, schedule="simple", shift=9.0))
    assert_close(scheduler.sigmas, torch.tensor(sigmas), atol=2e-6, rtol=0.0)
    assert_close(scheduler.timesteps, torch.tensor(sigmas[:-1]) * 1000)


def test_each_step_reports_its_x0_prediction():
    seen = []

    class Seen(Watch):
        def stepped(self, *step):
            seen.append(step)

    latent = denoised(SampleSpec(seed=5, steps=30, solver="euler", schedule="simple", shift=5.0), watch=Seen())
    assert [(step, total) for step, total, *_ in seen] == [(step, 30) for step in range(1, 31)]
    assert_close(seen[0][3], torch.full(SHAPE, MEAN), atol=1e-3, rtol=0.0)  # of pure noise: the mean
    for last in seen[-1][2:]:  # the latent after the step too
        assert_close(last, latent, atol=1e-5, rtol=0.0)


def test_the_noise_is_that_of_a_cpu_generator():
    seed = 2**63 + 5
    assert torch.equal(noise_of(SHAPE, seed), torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))
