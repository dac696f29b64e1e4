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
from ascend_runtime.engine.sampling import Watch, denoise, make_scheduler, noise_of, noisy, simple_sigmas
from ascend_runtime.models.registry import family
from ascend_runtime.specs.jobs import OWN, SIMPLE, SOLVERS
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
