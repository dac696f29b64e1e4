"""A sampler outside of the ranks, for tests: Euler's, with guidance, by one model call a step."""

import itertools

import torch
from ascend_runtime.client.model_calls import NetworkPass
from ascend_runtime.engine.sampling import noise_of
from ascend_runtime.wire.messages import SamplerRun

numbers = itertools.count(1)


def run_of(sigmas) -> SamplerRun:
    """A new run."""
    return SamplerRun(number=next(numbers), sigmas=tuple(sigmas))


def euler(runtime, model, inputs, shape, sigmas, *, seed=7, scale=4.0, after=lambda step, result: None, **options):
    """The latent [B,C,T,H,W], normalised. inputs: of "cond", and of "uncond" unless the scale is 1.

    after: called with each step and the result of its model call.
    """
    x, run = noise_of(shape, seed) * sigmas[0], run_of(sigmas)
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        result = runtime.velocity(model, passes_of(x, sigma, inputs), run, step, **options)
        x = x + (following - sigma) * guided(result.tensor.float().chunk(len(inputs)), scale)
        after(step, result)
    return x


def passes_of(x, sigma, inputs, **more) -> list[NetworkPass]:
    """A pass of each branch, with one latent: uncond first, as core ComfyUI has them."""
    times = torch.full((len(x),), 1000.0 * sigma)
    branches = sorted(inputs, reverse=True)
    return [NetworkPass(branch, x.clone(), times, inputs[branch], **more) for branch in branches]


def guided(velocities, scale):
    if len(velocities) == 1:
        return velocities[0]
    uncond, cond = velocities
    return uncond + scale * (cond - uncond)
