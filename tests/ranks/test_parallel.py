"""Several ranks give what one rank gives, in fp32: plans for two and three, lengths, experts, groups side by side.

The plans for up to eight: test_plans.py.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ascend_runtime import ParallelSpec, SampleSpec
from torch.testing import assert_close

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
EVEN = (1, 16, 3, 8, 8)  # 48 tokens: 2 and 3 divide them
ODD = (2, 16, 5, 2, 10)  # 25 tokens, which neither divides, in a batch of 2
FEW = (1, 16, 1, 2, 4)  # 2 tokens: fewer than three ranks


@pytest.fixture(scope="module")
def three_ranks(new_runtime):
    with new_runtime(3) as runtime:
        yield runtime


def sample(runtime, specs, shape, parallel=None, guidance_scale=4.0):
    spec = SampleSpec(seed=11, steps=4, guidance_scale=guidance_scale)
    negative = specs.text(2) if spec.guidance_scale != 1 else None
    return runtime.sample(specs.model, spec, torch.zeros(shape), specs.text(1), negative, parallel=parallel).tensor


@pytest.fixture(scope="module")
def expected(one_rank, specs):
    """What one rank makes of a shape and a guidance scale."""
    known = {}

    def by_one_rank(shape, guidance_scale=4.0):
        if (shape, guidance_scale) not in known:
            known[shape, guidance_scale] = sample(one_rank, specs, shape, guidance_scale=guidance_scale)
            assert known[shape, guidance_scale].std() > 0.1
        return known[shape, guidance_scale]

    return by_one_rank


def named(*plans):
    """Plans as parameters of a test."""
    return [pytest.param(plan, id=" ".join(f"{key} {value}" for key, value in plan.items())) for plan in plans]


@pytest.mark.parametrize("shape", [EVEN, ODD, FEW], ids=["even", "odd", "few"])
@pytest.mark.parametrize("plan", named(
    {"cfg_degree": 2}, {"ulysses_degree": 2}, {"ring_degree": 2}, {"tp_degree": 2},
    {"cfg_degree": 2, "fsdp": True}, {"ulysses_degree": 2, "fsdp": True}, {}
))  # fmt: skip
def test_two_ranks(two_ranks, specs, expected, shape, plan):
    assert_close(sample(two_ranks, specs, shape, ParallelSpec(ranks=2, **plan)), expected(shape), **TOLERANCE)


@pytest.mark.parametrize("fsdp", [False, True], ids=["", "fsdp"])
@pytest.mark.parametrize("shape", [EVEN, ODD, FEW], ids=["even", "odd", "few"])
def test_three_ranks_divide_neither_heads_nor_tokens(three_ranks, specs, expected, shape, fsdp):
    assert_close(sample(three_ranks, specs, shape, ParallelSpec(fsdp=fsdp)), expected(shape), **TOLERANCE)


def test_without_guidance_all_ranks_share_the_sequence(two_ranks, specs, expected):
    plan = ParallelSpec(ranks=2, cfg_degree=2, ulysses_degree=1)
    assert_close(sample(two_ranks, specs, EVEN, plan, 1.0), expected(EVEN, 1.0), **TOLERANCE)
    assert (expected(EVEN, 1.0) - expected(EVEN)).abs().max() > 1e-2


@pytest.mark.parametrize("plan", named({}, {"fsdp": True}, {"tp_degree": 2}))
def test_an_expert_without_guidance_beside_one_with(two_ranks, one_rank, specs_of, checkpoints, plan):
    """The high-noise expert is guided and the low-noise one is not: the ranks of the cfg axis stay in step."""
    specs = specs_of(checkpoints(experts=2))
    spec = SampleSpec(seed=3, steps=4, guidance_scale=4.0, guidance_scale_low_noise=1.0)
    one, two = (
        runtime.sample(specs.model, spec, torch.zeros(EVEN), specs.text(1), specs.text(2), parallel=parallel).tensor
        for runtime, parallel in ((one_rank, None), (two_ranks, ParallelSpec(ranks=2, **plan)))
    )
    assert_close(two, one, **TOLERANCE)


def test_decode_and_encode_do_not_hang_on_the_ranks(two_ranks, one_rank, specs):
    texts = [runtime.encode(specs.encoder, "a red ball").tensor for runtime in (one_rank, two_ranks)]
    assert_close(*texts, **TOLERANCE)
    latent = torch.randn(EVEN, generator=torch.Generator().manual_seed(1))
    frames = [runtime.decode(specs.vae, latent).tensor for runtime in (one_rank, two_ranks)]
    assert frames[0].std() > 0.01
    assert_close(*frames, **TOLERANCE)


def test_two_groups_at_once_do_not_meet(two_ranks, new_runtime, specs, expected):
    with new_runtime(2) as other, ThreadPoolExecutor(2) as pool:
        other.start()
        assert not set(other.pids) & set(two_ranks.pids)
        for _ in range(2):
            first = pool.submit(sample, two_ranks, specs, EVEN)
            second = pool.submit(sample, other, specs, ODD)
            assert_close(first.result(), expected(EVEN), **TOLERANCE)
            assert_close(second.result(), expected(ODD), **TOLERANCE)
