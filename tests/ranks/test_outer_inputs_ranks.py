"""Passes with the inputs of core ComfyUI's models are the same on several ranks as on one."""

import outer_cases
import outer_sampler
import pytest
import torch
from ascend_runtime import AccelerationSpec, DiffusionModelSpec, ParallelSpec, RainFusionSpec, StepCacheSpec
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
SOME_PLANS = [PLANS[number] for number in (0, 1, 3, 5, 7, 10)]


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


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--all-stock")
    if "plan" in metafunc.fixturenames:
        metafunc.parametrize("name, plan", PLANS if every else SOME_PLANS, ids=str)
    if "accelerator" in metafunc.fixturenames:
        metafunc.parametrize("name, accelerator", ACCELERATED if every else ACCELERATED[::2])


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
    with pytest.raises(ValueError, match="the input vace_context, which this model does not read. It belongs to"):
        called(two_ranks, models(case), pass_of(latent, timesteps, wrong))
    called(two_ranks, models(case), pass_of(latent, timesteps, inputs))


ACCELERATORS = {
    "RainFusion": AccelerationSpec(rainfusion=RainFusionSpec(sparsity=0.5, start=1)),
    "first-block cache": AccelerationSpec(step_cache=StepCacheSpec(method="fbcache", threshold=2.0)),
}
ACCELERATED = [  # cases with the accelerator that is used
    ("control, 2.1", "RainFusion"), ("further frames, odd", "RainFusion"), ("hunyuan, v2", "RainFusion"),
    ("control, 2.1", "first-block cache"),
]  # fmt: skip


def test_accelerators_cover_tokens_that_are_not_the_latents(runtimes, models, name, accelerator):
    case = CASES[name]._replace(size=(3, 23, 24) if "odd" in name else (3, 24, 24))
    case = case._replace(inputs={entry: resized(given, case.size) for entry, given in case.inputs.items()})
    _, _, inputs = case.drawn(SEED)
    given = {"cond": {entry: x.contiguous() for entry, x in inputs.tensors.items()}}
    plain, *made = (
        outer_sampler.euler(runtimes(ranks), models(case), given, inputs.shape, (1.0, 0.9, 0.7, 0.4, 0.0), scale=1,
                            acceleration=acceleration)
        for ranks, acceleration in ((1, AccelerationSpec()), *((n, ACCELERATORS[accelerator]) for n in (1, 2)))
    )  # fmt: skip
    assert_close(made[1], made[0], atol=5e-5, rtol=0)
    assert (plain - made[0]).abs().max() > 1e-3, "it has no effect"


def resized(given, size):
    """An input of a case for a latent of another size."""
    return given if torch.is_tensor(given) or len(given) < 3 else (*given[:-2], *size[1:])
