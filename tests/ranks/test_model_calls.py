"""Model calls of a sampler outside of the ranks equal the steps of a sampling job, on every plan."""

import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import outer_sampler
import pytest
import random_hunyuan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, JobCancelled, ParallelSpec, SampleSpec
from ascend_runtime.client import submission
from ascend_runtime.client.model_calls import HeldByRanks
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, RainFusionSpec, StepCacheSpec
from benchmarks.shared_bytes import SharedBytes
from diffusers import WanTransformer3DModel
from rank_processes import shared_memory as shared_memory_of
from torch.testing import assert_close

SHAPE = (1, 16, 3, 6, 10)  # 45 tokens, of which no two ranks have as many
SIGMAS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.0)
SHORT = (1.0, 0.9, 0.75, 0.5, 0.0)
NEAR = {"atol": 5e-5, "rtol": 0.0}
PLANS = {
    2: [{"cfg_degree": 2}, {"ulysses_degree": 2}, {"ring_degree": 2}, {"tp_degree": 2}, {"fsdp": True},
        {"ulysses_degree": 2, "fsdp": True}],
    4: [{"cfg_degree": 2, "ulysses_degree": 2}, {"cfg_degree": 2, "ring_degree": 2, "fsdp": True},
        {"cfg_degree": 2, "tp_degree": 2}, {"ring_degree": 2, "ulysses_degree": 2}],
}  # fmt: skip
CACHES = {
    "attention": AccelerationSpec(attention_cache=AttentionCacheSpec(start=2, end=6, interval=2)),
    "blocks": AccelerationSpec(block_cache=BlockCacheSpec(start=1, end=6, interval=2, first_block=1, last_block=1)),
    "fbcache": AccelerationSpec(step_cache=StepCacheSpec(threshold=0.7)),
    "taylorseer": AccelerationSpec(step_cache=StepCacheSpec(method="taylorseer", interval=3, first_steps=2)),
    "sparse": AccelerationSpec(rainfusion=RainFusionSpec(start=2)),
}


def texts_of(specs, batch=1):
    return {"cond": specs.text(1, batch), "uncond": specs.text(2, batch)}


def inputs_of(texts):
    return {branch: {"text": text} for branch, text in texts.items()}


def in_the_job(runtime, model, texts, *, sigmas=SHORT, shape=SHAPE, **options):
    """The result of a sampling job with the texts of one branch or of two."""
    spec = SampleSpec(seed=7, solver="euler", sigmas=sigmas, guidance_scale=4.0 if len(texts) == 2 else 1.0)
    return runtime.sample(model, spec, torch.zeros(shape), *texts.values(), **options)


def by_calls(runtime, model, inputs, *, sigmas=SHORT, shape=SHAPE, **options):
    """The latent [B,C,T,H,W] of the same sampler by model calls, not normalised."""
    latent = outer_sampler.euler(runtime, model, inputs, shape, sigmas, **options)
    return tiny_models.denormalised(latent, tiny_models.wan_vae())


def one_call(runtime, model, passes, **options):
    """The velocity of each pass."""
    result = runtime.velocity(model, passes, outer_sampler.run_of(SHORT), 0, **options)
    return result.tensor.chunk(len(passes))


def a_pass(specs, branch="cond", text=1, *, seed=1, shape=SHAPE, tokens=512, **more):
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return outer_sampler.passes_of(latent, 0.9, {branch: {"text": specs.text(text)[:, :tokens]}}, **more)[0]


# The same latent


@pytest.mark.parametrize("branches", [1, 2])
def test_one_rank_makes_the_latent_of_a_sampling_job(one_rank, specs, branches):
    texts = dict(list(texts_of(specs).items())[:branches])
    expected = in_the_job(one_rank, specs.model, texts).tensor
    assert expected.std() > 0.1
    assert_close(by_calls(one_rank, specs.model, inputs_of(texts)), expected, **NEAR)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("plan", PLANS[2], ids=str)
def test_every_plan_makes_the_latent_of_one_rank(one_rank, two_ranks, specs, plan, branches):
    inputs = inputs_of(dict(list(texts_of(specs, 2).items())[:branches]))
    shape = (2, *SHAPE[1:])
    expected = by_calls(one_rank, specs.model, inputs, shape=shape)
    assert expected.std() > 0.1
    latent = by_calls(two_ranks, specs.model, inputs, shape=shape, parallel=ParallelSpec(ranks=2, **plan))
    assert_close(latent, expected, **NEAR)


def test_one_branch_goes_to_all_ranks(two_ranks, specs):
    """Two go to one rank of the cfg axis each."""
    passes = [a_pass(specs), a_pass(specs, "uncond", 2)]
    for number, degrees in ((1, (1, 2)), (2, (2, 1))):
        info = two_ranks.velocity(specs.model, passes[:number], outer_sampler.run_of(SHORT), 0).info
        assert (info["cfg_degree"], info["ulysses_degree"]) == degrees


def test_plans_of_four_ranks(request, runtimes, specs):
    if not request.config.getoption("--all-stock"):
        pytest.skip("takes --all-stock")
    expected = by_calls(runtimes(1), specs.model, inputs_of(texts_of(specs)))
    for plan in PLANS[4]:
        options = {"parallel": ParallelSpec(ranks=4, **plan)}
        assert_close(by_calls(runtimes(4), specs.model, inputs_of(texts_of(specs)), **options), expected, **NEAR)


def test_two_experts_change_at_the_boundary(two_ranks, specs_of, checkpoints):
    specs = specs_of(checkpoints(experts=2))
    expected = in_the_job(two_ranks, specs.model, texts_of(specs)).tensor
    assert_close(by_calls(two_ranks, specs.model, inputs_of(texts_of(specs))), expected, **NEAR)


def test_hunyuan_video(two_ranks, tmp_path):
    model = DiffusionModelSpec(path=str(random_hunyuan.folder(tmp_path)))
    given = {"cond": random_hunyuan.conditioning(9, seed=1), "uncond": random_hunyuan.conditioning(5, seed=2)}
    for one in given.values():
        one.numbers = {"guidance": 8.0}
    spec = SampleSpec(seed=7, solver="euler", sigmas=SHORT, guidance_scale=4.0)
    expected = two_ranks.sample(model, spec, torch.zeros(SHAPE), *given.values()).tensor
    inputs = {name: {"text": one.text, "y": one.pooled, "guidance": torch.tensor([8.0])} for name, one in given.items()}
    latent = outer_sampler.euler(two_ranks, model, inputs, SHAPE, SHORT)
    scaled = latent / random_hunyuan.vae().config.scaling_factor
    assert expected.std() > 0.1
    assert_close(scaled, expected, atol=1e-4, rtol=0)


# Several passes in a call


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_pass_of_a_call_equals_a_call_of_its_own(runtimes, specs, ranks):
    """More passes than branches, as areas have, with texts of several lengths."""
    passes = [a_pass(specs, "uncond", 2), a_pass(specs), a_pass(specs, text=3, tokens=40), a_pass(specs, seed=2),
              a_pass(specs, "uncond", 4, tokens=7)]  # fmt: skip
    together = one_call(runtimes(ranks), specs.model, passes)
    assert len({float(each.sum()) for each in together}) == 5
    for each, one in zip(together, passes):
        assert_close(one_call(runtimes(1), specs.model, [one])[0], each, **NEAR)


def test_calls_of_one_step_may_have_latents_of_several_sizes(two_ranks, one_rank, specs):
    run, sizes = outer_sampler.run_of(SHORT), [SHAPE, (1, 16, 3, 4, 4), SHAPE, (1, 16, 1, 8, 8)]
    for shape in sizes:
        passes = [a_pass(specs, shape=shape), a_pass(specs, "uncond", 2, shape=shape)]
        got = two_ranks.velocity(specs.model, passes, run, 0).tensor
        assert_close(got, torch.cat(one_call(one_rank, specs.model, passes)), **NEAR)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_skipped_block_is_as_if_the_network_had_none(two_ranks, specs, checkpoint, tmp_path, fsdp):
    shutil.copytree(checkpoint, tmp_path / "short")
    whole = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    whole.blocks = whole.blocks[:1]
    whole.register_to_config(num_layers=1)
    shutil.rmtree(tmp_path / "short" / "transformer")
    whole.save_pretrained(tmp_path / "short" / "transformer")
    options = {"parallel": ParallelSpec(ranks=2, fsdp=fsdp)}
    passes = [a_pass(specs, skipped=(1,)), a_pass(specs, "uncond", 2)]
    expected = one_call(two_ranks, DiffusionModelSpec(path=str(tmp_path / "short")), [a_pass(specs)], **options)[0]
    skipped, full = one_call(two_ranks, specs.model, passes, **options)
    assert_close(skipped, expected, **NEAR)
    assert_close(full, one_call(two_ranks, specs.model, [passes[1]], **options)[0], **NEAR)
    assert (one_call(two_ranks, specs.model, [a_pass(specs)], **options)[0] - skipped).abs().max() > 1e-2


# Accelerators


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerators_leave_out_the_same_steps_as_in_a_sampling_job(runtimes, specs, ranks, cache):
    seen, options = [], {"sigmas": SIGMAS, "acceleration": CACHES[cache]}
    job = in_the_job(runtimes(ranks), specs.model, texts_of(specs), **options)
    latent = by_calls(runtimes(ranks), specs.model, inputs_of(texts_of(specs)), **options,
                      after=lambda step, result: seen.append(result.info["acceleration"]))  # fmt: skip
    assert_close(latent, job.tensor, **NEAR)
    wanted, facts = job.info["acceleration"], seen[-1]
    counted = ("accelerators", "steps_reusing", "attentions_reused", "blocks_skipped", "mean_density", "flops_saved")
    assert {name: facts[name] for name in counted} == {name: wanted[name] for name in counted}
    assert facts["flops_saved"] > 0 or cache == "sparse"
    assert len(facts["seconds_a_step"]) == len(SIGMAS) - 1
    plain = by_calls(runtimes(ranks), specs.model, inputs_of(texts_of(specs)), sigmas=SIGMAS)
    assert (plain - latent).abs().max() > 1e-3 or cache == "sparse"


def test_two_models_that_take_turns_keep_what_their_accelerators_cached(two_ranks, specs, specs_of, checkpoints):
    """Each leaves out the steps that it does when the other has no calls."""
    models = [specs.model, specs_of(checkpoints(seed=1)).model]
    options = {"acceleration": CACHES["taylorseer"]}
    inputs, runs = inputs_of(texts_of(specs)), [outer_sampler.run_of(SIGMAS) for _ in models]
    together = []
    for step, sigma in enumerate(SIGMAS[:-1]):
        passes = outer_sampler.passes_of(torch.ones(SHAPE) * sigma, sigma, inputs)
        together.append([two_ranks.velocity(model, passes, run, step, **options) for model, run in zip(models, runs)])
    for number, model in enumerate(models):
        run = outer_sampler.run_of(SIGMAS)
        for step, sigma in enumerate(SIGMAS[:-1]):
            passes = outer_sampler.passes_of(torch.ones(SHAPE) * sigma, sigma, inputs)
            expected = two_ranks.velocity(model, passes, run, step, **options)
            assert_close(together[step][number].tensor, expected.tensor, atol=1e-6, rtol=0)
        assert expected.info["acceleration"]["steps_reusing"]


REFUSED = {
    "a step twice": [(0, ("cond",)), (0, ("cond",))],
    "a step before": [(1, ("cond",)), (0, ("cond",))],
    "a branch twice": [(0, ("cond", "cond", "uncond"))],
    "other prompts": [(0, ("cond", "uncond")), (1, ("cond",))],
    "uncond first": [(0, ("uncond",)), (0, ("cond",))],
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_do_not_suit_an_accelerator_are_refused(one_rank, specs, case):
    def calls(options):
        run = outer_sampler.run_of(SHORT)
        for step, branches in REFUSED[case]:
            passes = [a_pass(specs, branch, number) for number, branch in enumerate(branches)]
            one_rank.velocity(specs.model, passes, run, step, **options)

    with pytest.raises(ValueError, match="accelerator.* (once|same prompts)"):
        calls({"acceleration": CACHES["fbcache"]})
    calls({})


def test_skipped_blocks_and_an_accelerator_are_refused(one_rank, specs):
    with pytest.raises(ValueError, match="Skip layer guidance"):
        one_call(one_rank, specs.model, [a_pass(specs, skipped=(1,))], acceleration=CACHES["taylorseer"])


# What is refused


def test_arguments_that_do_not_fit_are_refused_by_name(one_rank, specs):
    run, good = outer_sampler.run_of(SHORT), a_pass(specs)
    wrong = [
        ("passes is empty", [], run, 0),
        ("step is 4", [good], run, 4),
        ("branch", [a_pass(specs, "positive")], run, 0),
        ("shapes", [good, a_pass(specs, shape=(1, 16, 3, 6, 12))], run, 0),
        ("Block 2", [a_pass(specs, skipped=(2,))], run, 0),
        ("sigmas", [good], outer_sampler.run_of([1.0]), 0),
    ]
    for text, *arguments in wrong:
        with pytest.raises(ValueError, match=text):
            one_rank.velocity(specs.model, *arguments)


# What the ranks hold


def test_from_the_second_call_on_no_file_is_needed(one_rank, checkpoint, specs, specs_of, tmp_path):
    model = specs_of(shutil.copytree(checkpoint, tmp_path / "model")).model
    run, passes = outer_sampler.run_of(SHORT), [a_pass(specs)]
    first = one_rank.velocity(model, passes, run, 0).tensor
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(one_rank.velocity(model, passes, run, 1).tensor, first)
    with pytest.raises(ValueError, match="model"):
        one_rank.velocity(model, passes, outer_sampler.run_of(SHORT), 0)


@pytest.fixture
def counted():
    with SharedBytes() as counting:
        yield counting


TIMESTEPS = 2 * 4  # bytes: one for each pass
TEXTS = 2 * 512 * tiny_models.TEXT_DIM * 4
LATENT = 4 * 16 * 3 * 6 * 10


def test_from_the_second_step_on_only_the_latent_is_sent_and_velocities_come_back(two_ranks, specs, counted):
    steps, inputs = [], inputs_of(texts_of(specs))
    two_ranks.free()
    by_calls(two_ranks, specs.model, inputs, after=lambda *_: steps.append(counted.taken()))
    assert steps[0] == (LATENT + TIMESTEPS + TEXTS, 2 * LATENT)
    assert steps[1:] == [(LATENT + TIMESTEPS, 2 * LATENT)] * (len(steps) - 1)
    again = []
    by_calls(two_ranks, specs.model, inputs, after=lambda *_: again.append(counted.taken()))
    assert again == steps[1:2] * len(steps), "a new run with the same prompts sends them again"


def freed(runtime, specs):
    runtime.free()


def killed(runtime, specs):
    os.kill(runtime.pids[1], signal.SIGKILL)
    while runtime.alive:
        time.sleep(0.01)


def failed(runtime, specs):
    with pytest.raises(ValueError):
        runtime.sample(specs.model, SampleSpec(steps=1), torch.zeros(1, 3, 1, 2, 2), specs.text(1), specs.text(2))


def other_job(runtime, specs):
    runtime.sample(specs.model, SampleSpec(steps=1), torch.zeros(SHAPE), specs.text(3), specs.text(2))


def cancelled(runtime, specs):
    with pytest.raises(JobCancelled):
        one_call(runtime, specs.model, [a_pass(specs, text=text) for text in range(20)], should_cancel=lambda: True)


def refused(runtime, specs):
    with pytest.raises(ValueError, match="text"):
        wide = replace(a_pass(specs), inputs={"text": torch.zeros(1, 3, tiny_models.TEXT_DIM + 1)})
        one_call(runtime, specs.model, [a_pass(specs, text=9), wide])


@pytest.mark.parametrize("event, sends", [(freed, True), (killed, True), (failed, True), (cancelled, True),
                                          (refused, True), (other_job, False)])  # fmt: skip
def test_a_run_goes_on_after(two_ranks, specs, counted, event, sends):
    """With the same latent; what the ranks may have lost is sent again."""
    inputs, steps = inputs_of(texts_of(specs)), []

    def disturb(step, _):
        steps.append(counted.taken()[0])
        if step == 1:
            event(two_ranks, specs)
            counted.taken()

    expected = by_calls(two_ranks, specs.model, inputs)
    assert_close(by_calls(two_ranks, specs.model, inputs, after=disturb), expected, atol=1e-6, rtol=0)
    assert steps[2] == LATENT + TIMESTEPS + sends * TEXTS and steps[3] == LATENT + TIMESTEPS


def test_ranks_whose_steps_take_long_may_take_as_long_to_answer_a_cancel(two_ranks, specs, monkeypatch):
    """The longest pause of a run's calls counts: of each call for itself, the first minute would end the group."""
    monkeypatch.setattr(submission, "CANCEL_DEADLINE", 0.05)
    run, pids = outer_sampler.run_of(SHORT), two_ranks.pids
    two_ranks.velocity(specs.model, [a_pass(specs)], run, 0)

    def halted(step, **hooks):
        os.kill(pids[1], signal.SIGSTOP)
        resumed = threading.Timer(0.8, os.kill, (pids[1], signal.SIGCONT))
        resumed.start()
        try:
            two_ranks.velocity(specs.model, [a_pass(specs)], run, step, **hooks)
        finally:
            resumed.join()

    halted(1)
    with pytest.raises(JobCancelled):
        halted(2, should_cancel=lambda: True)
    assert two_ranks.pids == pids


def test_inputs_that_were_not_used_for_longest_are_dropped(one_rank, specs, monkeypatch, counted):
    """Two texts fit; the third takes the place of the first, which is sent again when it is needed."""
    monkeypatch.setattr(one_rank, "_held", HeldByRanks(most=TEXTS))
    sent = []
    run = outer_sampler.run_of(SHORT)
    for text in (1, 2, 3, 2, 1):
        one_rank.velocity(specs.model, [a_pass(specs, text=text)], run, 0)
        sent.append(counted.taken()[0] > LATENT + TIMESTEPS)
    assert sent == [True, True, True, False, True]


def test_inputs_stay_for_the_next_run_only(one_rank, specs, counted):
    """A rank keeps the message of each input, so that what old runs have sent must go."""
    sent, kept = [], []
    for text in (1, 2, 1, 3, 4, 1, 5, 6, 7, 8):
        one_call(one_rank, specs.model, [a_pass(specs, text=text)])
        sent.append(counted.taken()[0] > LATENT + TIMESTEPS)
        kept.append(len(shared_memory_of(one_rank.pids)))
    assert sent == [True, True, False, *[True] * 7]
    assert kept[-1] <= max(kept[:4])


def test_a_caller_may_write_to_its_inputs_afterwards(one_rank, specs):
    one = a_pass(specs)
    first = one_call(one_rank, specs.model, [one])[0]
    one.inputs["text"].mul_(2)
    changed = one_call(one_rank, specs.model, [one])[0]
    assert (changed - first).abs().max() > 1e-3


