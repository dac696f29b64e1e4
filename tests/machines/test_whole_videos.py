"""Ranks on two hosts make what one host's rank makes, latents and frames, in fp32: both families, on every axis, also
where Ulysses and slices cross hosts. torchrun starts them, and nothing else.

A sample by default; every plan with --all-machines.
"""

import hunyuan_pipelines
import outer_sampler
import pytest
import tiny_llava
import torch
from ascend_runtime import ParallelSpec, SampleSpec, TextEncoderSpec, VaeSpec
from msgspec.structs import replace
from new_prompts import new_prompt
from torch.testing import assert_close

NEAR = {"atol": 1e-4, "rtol": 0.0}
SHAPE = (1, 16, 3, 6, 10)  # 45 tokens, of which no two ranks have as many
PROMPT = "a red ball moves left to right"
PLANS = {
    1: {
        "cfg": {"cfg_degree": 2},
        "ring": {"ring_degree": 2},
        "ring gather": {"ring_degree": 2, "ring_exchange": "gather"},
        "ulysses": {"ulysses_degree": 2},
        "slices": {"tp_degree": 2},
        "fsdp": {"cfg_degree": 2, "fsdp": True},
        "ulysses fsdp": {"ulysses_degree": 2, "fsdp": True},
    },
    2: {
        "automatic": {},
        "cfg ulysses": {"cfg_degree": 2, "ulysses_degree": 2},
        "cfg ring": {"cfg_degree": 2, "ring_degree": 2},
        "ring ulysses": {"ring_degree": 2, "ulysses_degree": 2},
        "ring": {"ring_degree": 4},
        "ulysses": {"ulysses_degree": 4},
        "cfg slices": {"cfg_degree": 2, "tp_degree": 2},
        "ulysses slices": {"ulysses_degree": 2, "tp_degree": 2},
        "fsdp": {"cfg_degree": 2, "ulysses_degree": 2, "fsdp": True},
        "ring fsdp": {"ring_degree": 4, "fsdp": True},
    },
}
SOME = {1: {"cfg", "ulysses fsdp"}, 2: {"ring ulysses", "fsdp"}}
FAMILIES = ("wan", "hunyuan")


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--all-machines")
    if "plan" in metafunc.fixturenames:
        plans = [(each, name) for each, names in PLANS.items() for name in names if every or name in SOME[each]]
        metafunc.parametrize("ranks_of_each, plan", plans, ids=[f"2 x {each}, {name}" for each, name in plans])
    elif "ranks_of_each" in metafunc.fixturenames:
        metafunc.parametrize("ranks_of_each", (1, 2), ids=["2 x 1", "2 x 2"])


@pytest.fixture
def pair(pairs, ranks_of_each):
    return pairs(ranks_of_each)


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return hunyuan_pipelines.Case("i2v replace", tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def once():
    """`once(key, make)`: what make() returned at the first call with this key."""
    made = {}

    def remembered(key, make):
        if key not in made:
            made[key] = make()
        return made[key]

    return remembered


def wan_latent(runtime, specs, **plan):
    spec = SampleSpec(seed=11, steps=3, guidance_scale=4.0)
    parallel = ParallelSpec(ranks=runtime.world_size, **plan)
    result = runtime.sample(specs.model, spec, torch.zeros(SHAPE), specs.text(1), specs.text(2), parallel=parallel)
    return result.tensor


def hunyuan_latent(runtime, case, **plan):
    return case.sample(runtime, plan=plan, guidance_scale=3.0)


def assert_same(made, expected):
    assert expected.std() > 0.01
    assert_close(made, expected, **NEAR)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_latent_on_every_plan(pair, one_rank, specs, hunyuan, once, family, ranks_of_each, plan):
    latent_of, made_of = {"wan": (wan_latent, specs), "hunyuan": (hunyuan_latent, hunyuan)}[family]
    expected = once(family, lambda: latent_of(one_rank, made_of))
    assert_same(latent_of(pair.client, made_of, **PLANS[ranks_of_each][plan]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_and_back(pair, one_rank, specs, hunyuan, once, family):
    """VAE tiles on all hosts, whose frames come back to the client while later ones are made."""
    vae = specs.vae if family == "wan" else VaeSpec(path=str(hunyuan.folder))
    latent = torch.randn(1, 16, 2, 7, 5, generator=torch.Generator().manual_seed(5))
    frames = once((family, "frames"), lambda: one_rank.decode(vae, latent).tensor)
    again = once((family, "again"), lambda: one_rank.encode_video(vae, frames).tensor)
    assert_same(pair.client.decode(vae, latent).tensor, frames)
    assert_same(pair.client.encode_video(vae, frames).tensor, again)


def test_a_batch_of_frames(request, pair, one_rank, specs, once):
    if not request.config.getoption("--all-machines"):
        pytest.skip("only with --all-machines")
    latent = torch.randn(2, 16, 2, 5, 6, generator=torch.Generator().manual_seed(6))
    expected = once("batch", lambda: one_rank.decode(specs.vae, latent).tensor)
    assert_same(pair.client.decode(specs.vae, latent).tensor, expected)


def test_model_calls(pair, one_rank, specs, once):
    """Of a sampler outside of the ranks; the second run sends what the ranks hold by number."""
    inputs = {branch: {"text": specs.text(seed)} for branch, seed in (("cond", 1), ("uncond", 2))}
    sigmas = (1.0, 0.9, 0.75, 0.5, 0.0)

    def latent(runtime):
        return outer_sampler.euler(runtime, specs.model, inputs, SHAPE, sigmas)

    expected = once("calls", lambda: latent(one_rank))
    for _ in range(2):
        assert_same(latent(pair.client), expected)


@pytest.mark.parametrize("placement", ["cpu", "ranks"])
def test_prompts(pair, one_rank, specs, once, placement):
    encoder = replace(specs.encoder, placement="cpu")
    for text in (PROMPT, once("prompt", new_prompt)):
        expected = once(("text", text), lambda: one_rank.encode(encoder, text).tensor)
        assert_same(pair.client.encode(replace(encoder, placement=placement), text).tensor, expected)


@pytest.mark.parametrize("placement", ["cpu", "ranks"])
def test_hunyuan_prompts(request, pair, one_rank, tmp_path_factory, once, placement):
    if not request.config.getoption("--all-machines"):
        pytest.skip("only with --all-machines")
    folder = once("llava", lambda: tiny_llava.save(tmp_path_factory.mktemp("encoders"), images=True, seed=7))
    encoder = TextEncoderSpec(path=str(folder), placement="cpu")
    expected = once("hunyuan text", lambda: one_rank.encode(encoder, PROMPT))
    made = pair.client.encode(replace(encoder, placement=placement), PROMPT)
    assert_same(made.tensor, expected.tensor)
    assert_same(made.tensors["pooled"], expected.tensors["pooled"])
