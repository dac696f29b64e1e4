"""Model calls of a sampler outside of the ranks equal the steps of a sampling job."""

import outer_sampler
import pytest
import tiny_models
import torch
from ascend_runtime import SampleSpec, VideoSize
from torch.testing import assert_close

SHAPE = VideoSize(width=80, height=64, num_frames=9).latent_shape()
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)


def in_the_job(runtime, specs, texts, *, scale=4.0, shape=SHAPE, **options):
    """The latent of a sampling job, not normalised."""
    spec = SampleSpec(seed=7, solver="euler", sigmas=SIGMAS, guidance_scale=scale)
    return runtime.sample(specs.model, spec, torch.zeros(shape), *texts, **options).tensor


def by_calls(runtime, specs, texts, *, scale=4.0, shape=SHAPE, **options):
    """The same by model calls."""
    inputs = {branch: {"text": text} for branch, text in zip(("cond", "uncond"), texts)}
    latent = outer_sampler.euler(runtime, specs.model, inputs, shape, SIGMAS, scale=scale, **options)
    return tiny_models.denormalised(latent, tiny_models.wan_vae())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_the_latent_is_that_of_a_sampling_job(runtimes, specs, ranks, scale):
    texts = [specs.text(1), specs.text(2)][: 1 if scale == 1 else 2]
    expected = in_the_job(runtimes(ranks), specs, texts, scale=scale)
    assert expected.std() > 0.1
    assert_close(by_calls(runtimes(ranks), specs, texts, scale=scale), expected, atol=5e-5, rtol=0)
