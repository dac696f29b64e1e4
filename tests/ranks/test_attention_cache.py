"""AttentionCache and block cache leave out what their formula says, wherever a job's passes run, and tell so."""

import random
import re

import pytest
import torch
from ascend_runtime import ParallelSpec, SampleSpec
from ascend_runtime.acceleration.attention_cache import AttentionCache
from ascend_runtime.acceleration.block_cache import BlockCache
from ascend_runtime.acceleration.accelerators import Acceleration, Outline
from ascend_runtime.models.shared.block_stack import At, BlockStack
from ascend_runtime.acceleration.tally import Tally
from ascend_runtime.models.cost import BlockWork, Work
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, StepCacheSpec, Window
from torch.testing import assert_close

SHAPE = (1, 16, 3, 4, 6)
STEPS, LAYERS = 9, 3
PLANS = {"1 rank": (1, None), "cfg 2": (2, ParallelSpec(ranks=2, cfg_degree=2)),
         "Ulysses 2": (2, ParallelSpec(ranks=2, ulysses_degree=2))}  # fmt: skip
FORMULA = {"start": 2, "end": 7, "interval": 3, "first_block": 1, "last_block": 1}
REUSED = [3, 4, 6, 7]
CACHES = {"attention_cache": AttentionCacheSpec(**FORMULA), "block_cache": BlockCacheSpec(**FORMULA)}
WORK = Work((BlockWork(products=2.0, attention=4.0, whole=10.0),) * 9, rest=10.0)


def sample(runtime, specs, acceleration=AccelerationSpec(), *, plan=None, guidance=3.0, low=None, **options):
    spec = SampleSpec(
        seed=1, steps=STEPS, shift=5.0, solver="euler", guidance_scale=guidance, guidance_scale_low_noise=low
    )
    texts = specs.text(1), specs.text(2)
    return runtime.sample(specs.model, spec, torch.zeros(SHAPE), *texts, parallel=plan, acceleration=acceleration,
                          **options)  # fmt: skip


@pytest.fixture(params=PLANS)
def on(request, runtimes):
    """(a runtime, a plan for it)"""
    ranks, plan = PLANS[request.param]
    return runtimes(ranks), plan


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("experts, low", [(1, None), (2, None), (2, 1.0)])
def test_it_reuses_the_steps_of_the_formula(on, specs_of, checkpoints, cache, experts, low):
    """The low-noise expert, which begins with step 4 (of 9, shift 5), stores what it may not yet reuse; with guidance
    of its own it may have one branch. A warm-up changes nothing."""
    runtime, plan = on
    specs = specs_of(checkpoints(layers=LAYERS, experts=experts))
    acceleration = AccelerationSpec(**{cache: CACHES[cache]})
    done = [sample(runtime, specs, acceleration, plan=plan, low=low, warm_up=warm_up) for warm_up in (False, True)]
    expected = [step for step in REUSED if experts == 1 or step != 4]
    both = 1 if plan is not None and plan.cfg_degree == 2 else 2
    passes = sum(1 if low == 1.0 and step >= 4 else both for step in expected)
    for result in done:
        facts = result.info["acceleration"]
        counts = facts["attentions_reused"], facts["blocks_skipped"]
        assert facts["steps_reusing"] == expected
        assert counts == ((passes, 0) if cache == "attention_cache" else (0, passes))
        assert len(facts["seconds_a_step"]) == STEPS and facts["seen_speed_up"] > 0
        assert 0 < facts["flops_saved"] == pytest.approx(1 - 1 / facts["predicted_speed_up"])
    assert torch.equal(done[0].tensor, done[1].tensor)
    assert not torch.equal(done[0].tensor, sample(runtime, specs, plan=plan, low=low).tensor), "something is left out"


def test_what_leaves_nothing_out_changes_nothing(on, specs):
    runtime, plan = on
    dense = sample(runtime, specs, plan=plan)
    assert "acceleration" not in dense.info
    for spec in (AttentionCacheSpec(interval=1), BlockCacheSpec(interval=1), StepCacheSpec(threshold=0.0)):
        name = {AttentionCacheSpec: "attention_cache", BlockCacheSpec: "block_cache"}.get(type(spec), "step_cache")
        made = sample(runtime, specs, AccelerationSpec(**{name: spec}), plan=plan)
        facts = made.info["acceleration"]
        assert facts["steps_reusing"] == [] and facts["flops_saved"] == 0 and facts["predicted_speed_up"] == 1
        assert torch.equal(made.tensor, dense.tensor), spec


@pytest.mark.parametrize("cache", CACHES)
def test_on_all_blocks_and_steps_it_is_still_a_video(one_rank, specs, cache):
    spec = type(CACHES[cache])(start=0, end=STEPS, interval=2)
    dense = sample(one_rank, specs).tensor
    made = sample(one_rank, specs, AccelerationSpec(**{cache: spec}))
    assert made.info["acceleration"]["steps_reusing"] == [1, 3, 5, 7]
    assert_close(made.tensor, dense, atol=float(dense.std()), rtol=0.0)


# What is kept


@pytest.mark.parametrize("seed", range(3))
def test_attention_is_of_the_last_step_that_computed_it(seed):
    """And nothing is kept that no later step reuses."""
    draw = random.Random(seed)
    for _ in range(100):
        steps, blocks = draw.randint(1, 14), draw.randint(1, 4)
        window = random_window(draw, steps, blocks)
        cache, last = AttentionCache(window, steps, blocks, Tally(WORK)), {}
        for step in range(steps):
            for branch in ("cond", "uncond"):
                cache._tally.began(at := At("high_noise", branch, step))
                for block in range(blocks):
                    new = torch.tensor(float(step))
                    out = cache.attention(at, block, lambda: new)
                    reuses = window.reuses(step, steps) and block in window.blocks(blocks) and (branch, block) in last
                    assert out == (last[branch, block] if reuses else new)
                    last[branch, block] = out
            due = 2 * len(window.blocks(blocks)) if window.stores(step, steps) else 0
            assert len(cache._kept) == due, (window, step)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_add_what_they_added_in_the_last_step_that_computed_them(seed):
    draw = random.Random(seed)
    for _ in range(100):
        steps, blocks = draw.randint(1, 14), draw.randint(1, 4)
        window = random_window(draw, steps, blocks)
        cache, added = BlockCache(window, steps, blocks, Tally(WORK)), [0.0] * blocks
        for step in range(steps):
            reused = window.blocks(blocks) if window.reuses(step, steps) and step else ()
            stack = BlockStack(lambda block, x: x + (step + 1) * 10**block, blocks, lambda *_: torch.zeros(1))
            cache._tally.began(at := At("high_noise", "cond", step))
            out = cache.blocks(at, stack, torch.tensor(0.0))
            added = [before if block in reused else (step + 1) * 10.0**block for block, before in enumerate(added)]
            assert out == sum(added), (window, step)
            assert len(cache._kept) == window.stores(step, steps)


def random_window(draw, steps, blocks):
    start = draw.choice([None, draw.randint(0, steps)])
    first = draw.randint(0, blocks - 1)
    return Window(
        start=start, end=draw.choice([None, draw.randint(start or steps, steps + 2)]), interval=draw.randint(1, 5),
        first_block=first, last_block=draw.choice([None, draw.randint(first, blocks + 1)]),
    )  # fmt: skip


# A speed-up that is asked for, and memory


def outline(**changes):
    return Outline(**{"experts": ("high_noise",) * 40, "known": {}, "grid": (1, 1, 4), "own": 4, "branches": 2,
                      "output": 100, "room": 10**6, "ring": 1, "work": WORK, **changes})  # fmt: skip


@pytest.mark.parametrize("ratio", [1.05, 1.1, 1.2, 1.35])
def test_a_ratio_chooses_the_window(ratio):
    """36 % of the FLOPs are attention's: where ever it begins one step later, the ratio is missed."""
    spec, share = AttentionCacheSpec(ratio=ratio, interval=4), 0.36
    window = spec.windowed(40, share)

    def speed_up(of):
        return 1 / (1 - share * len(of.reused(40)) / 40)

    assert speed_up(window) >= ratio
    later = Window(start=window.start + 1, end=window.end, interval=window.interval)
    assert speed_up(later) < ratio
    if window.interval > spec.interval:
        assert speed_up(Window(start=0, end=window.end, interval=window.interval - 1)) < ratio


def test_a_ratio_in_a_job_of_fewer_steps_than_the_interval():
    assert AttentionCacheSpec(ratio=1.1, interval=4).windowed(2, share=0.36).reused(2) == [1]


def test_a_ratio_that_no_window_reaches():
    Acceleration(AccelerationSpec(attention_cache=AttentionCacheSpec(ratio=1.2)), outline())
    with pytest.raises(ValueError, match="ratio is 2.0, but attention is 36% of this job's FLOPs.*1.50 at most"):
        Acceleration(AccelerationSpec(attention_cache=AttentionCacheSpec(ratio=2.0)), outline())


@pytest.mark.parametrize("spec, needed, more", [
    ({"attention_cache": AttentionCacheSpec()}, 9 * 100 * 2, "set last_block to first_block"),
    ({"step_cache": StepCacheSpec(method="taylorseer", order=3)}, 2 * 4 * 100, "or a lower order"),
    ({"step_cache": StepCacheSpec()}, (2 + 2) * 100, "or a smaller video"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_computed(spec, needed, more):
    spec = AccelerationSpec(**spec)
    Acceleration(spec, outline(room=needed))
    with pytest.raises(ValueError, match=f"needs .* GB per rank.*{re.escape(more)}"):
        Acceleration(spec, outline(room=needed - 1))


@pytest.mark.parametrize("spec", [
    {"block_cache": BlockCacheSpec(start=0, end=3, interval=4)},
    {"step_cache": StepCacheSpec(method="taylorseer", first_steps=1, last_steps=0)},
])  # fmt: skip
def test_an_expert_lets_go_of_what_it_kept(spec):
    acceleration = Acceleration(
        AccelerationSpec(**spec), outline(experts=("high_noise",) * 2 + ("low_noise",) * 2)
    )
    ran = []
    for step, expert in enumerate(("high_noise", "high_noise", "low_noise", "low_noise")):
        stack = BlockStack(lambda block, x: (ran.append((step, block)), x + step)[1], 9, lambda *_: torch.zeros(1))
        out = acceleration.passing(At(expert, "cond", step)).blocks(stack, torch.tensor(0.0))
        assert out == 9 * (step - step % 2)
    assert ran == [(step, block) for step in (0, 2) for block in range(9)]
    assert acceleration.tally.facts()["steps_reusing"] == [1, 3] and list(acceleration._caches) == ["low_noise"]


def test_the_speed_up_that_is_seen_counts_the_passes_of_each_expert():
    """Two passes a step in 2 s, then one in 1 s: nothing is saved, though the median step is 2 s."""
    tally = Tally(WORK)
    for step, passes in enumerate((2, 2, 2, 1, 1)):
        for branch in ("cond", "uncond")[:passes]:
            tally.began(At("high_noise" if step < 3 else "low_noise", branch, step))
        tally.took(step, float(passes))
    assert tally.facts()["seen_speed_up"] == 1.0
