"""Passes with the inputs of core ComfyUI's models are the same on several ranks as on one."""

import outer_cases
import outer_sampler
import pytest
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec
from ascend_runtime.client.model_calls import NetworkPass
from ascend_runtime.models.shared.conditioning import Inputs
from outer_cases import CASES
from torch.testing import assert_close

SEED = 6
SHARED = {  # by name: cases with tokens before or behind the latent's, and how two ranks share them
    "control, 2.1": ({}, {"ring_degree": 2}, {"tp_degree": 2}, {"fsdp": True}),
    "further frames, odd": ({}, {"ring_degree": 2}),
    "5B, control, a timestep a frame": ({}, {"ring_degree": 2, "fsdp": True}),
    "one of two images": ({"fsdp": True},),
    "hunyuan, a mask": ({"ring_degree": 2},),
    "hunyuan, v2": ({}, {"ring_degree": 2}, {"tp_degree": 2}),
}
PLANS = [(name, plan) for name, plans in SHARED.items() for plan in plans]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(case)`: the description of a case's model."""
    folder = tmp_path_factory.mktemp("networks")
    outer_cases.write(folder)
    return lambda case: DiffusionModelSpec(path=str(folder / f"{case.file}.safetensors"), dtype="float32")


def called(runtime, model, *passes, **plan):
    """The velocities of one call."""
    return runtime.velocity(model, passes, outer_sampler.run_of((0.5, 0.0)), 0, parallel=ParallelSpec(**plan)).tensor


def pass_of(latent, timesteps, inputs: Inputs, branch="cond") -> NetworkPass:
    return NetworkPass(branch, latent, timesteps, {name: x.contiguous() for name, x in inputs.tensors.items()})


@pytest.mark.parametrize("name, plan", PLANS, ids=str)
def test_two_ranks_make_what_one_makes(runtimes, models, name, plan):
    case = CASES[name]
    given = pass_of(*case.drawn(SEED))
    expected = called(runtimes(1), models(case), given)
    assert expected.std() > 0.1 and expected.shape == given.latent.shape
    assert_close(called(runtimes(2), models(case), given, **plan), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("file", ["text", "hunyuan"])
def test_two_ranks_take_two_texts_of_unequal_lengths(runtimes, models, file):
    case = CASES[file]
    latent, timesteps, inputs = case.drawn(SEED)
    shorter = Inputs(inputs.shape, {**inputs.tensors, "text": inputs.tensors["text"][:, :4]})
    both = pass_of(latent, timesteps, shorter, "uncond"), pass_of(latent, timesteps, inputs)
    expected = torch.cat([called(runtimes(1), models(case), one) for one in both])
    assert_close(called(runtimes(2), models(case), *both), expected, atol=5e-5, rtol=0)


def test_an_input_that_the_model_does_not_read_fails_the_call_by_name(two_ranks, models):
    case = CASES["text"]
    latent, timesteps, inputs = case.drawn(SEED)
    wrong = Inputs(inputs.shape, {**inputs.tensors, "vace_context": torch.zeros(1, 8)})
    with pytest.raises(ValueError, match="the input vace_context, which this model does not read. It is of a VACE"):
        called(two_ranks, models(case), pass_of(latent, timesteps, wrong))
    called(two_ranks, models(case), pass_of(latent, timesteps, inputs))
