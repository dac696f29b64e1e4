"""What the planner predicts of FLOPs, exchanges and seconds; how costs are fitted, and kept in a profile."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from ascend_runtime.planner import exchange, models, rates, seconds
from ascend_runtime.planner.facts import Arrangement, Machine, Video
from ascend_runtime.planner.timing import fit, profile, skipped, work
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, Plan, RainFusionSpec
from ascend_runtime.specs import StepCacheSpec

MACHINE = Machine("npu", "a2", 8, 2**40, 2**40)
SMALL, LARGE = (1, 16, 5, 60, 104), (1, 16, 21, 90, 160)
NAMES = {"wan": "Wan2.1-T2V-14B", "hunyuan_video": "HunyuanVideo"}


@pytest.fixture(params=NAMES)
def model(request):
    return models.published(NAMES[request.param])


def video(model, shape=SMALL, branches=2, steps=4, **more):
    return Video(shape, ((0, branches),) * steps, model.family.text_tokens, **more)


def predicted(model, video, arrangement, card="a2"):
    return seconds.predicted(model, video, arrangement, MACHINE, rates.of_card(card))


def test_one_rank_sends_nothing(model):
    assert exchange.sent(model, video(model), Arrangement(Plan())) == {}


@pytest.mark.parametrize("plan, axes", [
    (Plan(cfg=2), {"cfg"}), (Plan(ulysses=2), {"ulysses", "sequence"}), (Plan(ring=2), {"ring", "sequence"}),
    (Plan(tp=2), {"tp"}), (Plan(cfg=2, ring=2, ulysses=2, tp=2), {"cfg", "ring", "ulysses", "sequence", "tp"}),
])  # fmt: skip
def test_each_axis_sends_what_it_exchanges(model, plan, axes):
    assert set(exchange.sent(model, video(model), Arrangement(plan))) == axes


def test_guidance_in_series_sends_twice_what_one_branch_does(model):
    sent = [exchange.sent(model, video(model, branches=branches), Arrangement(Plan(ulysses=4))) for branches in (1, 2)]
    assert {axis: 2 * number for axis, number in sent[0].items()} == sent[1]


def test_fsdp_sends_each_weight_but_those_that_are_replicated(model):
    """A shard goes to 7 others; eight of them are the weights, but for padding and what is replicated."""
    network, plan = model.experts[0], Arrangement(Plan(cfg=2, ulysses=4), fsdp=True)
    step = exchange.step_of(model, video(model), plan)
    found = {one.axis: one.sent for one in exchange.exchanges(step)}["fsdp"]
    weights = work.kept_bytes(network, model.dtype)
    assert 0.99 < found * 8 / 7 / weights < 1.01


def test_flops_of_all_ranks_are_those_of_one(model):
    """These plans divide tokens and heads, with at most one token of padding on each rank."""
    whole = work.of_step(exchange.step_of(model, video(model), Arrangement(Plan())))
    for plan in (Plan(ulysses=4), Plan(ulysses=2, tp=2), Plan(cfg=2, ulysses=2)):
        own = work.of_step(exchange.step_of(model, video(model), Arrangement(plan)))
        for unit in ("products", "linear"):
            assert 1 <= 4 * own[unit] / whole[unit] < 1.01, (plan, unit)


def test_flops_match_the_published_arithmetic():
    """12.07 PFLOP for a pass of HunyuanVideo at 1280x720 x 129 (118,800 tokens); a text of 256 tokens adds to it."""
    model = models.published("HunyuanVideo")
    step = exchange.step_of(model, video(model, (1, 16, 33, 90, 160), branches=1), Arrangement(Plan()))
    found = work.of_step(step)
    assert 12.0e15 < found["products"] + found["linear"] < 12.3e15


def test_more_tokens_steps_and_branches_take_longer(model):
    least = predicted(model, video(model), Arrangement(Plan(ulysses=2)))
    for other in (video(model, LARGE), video(model, steps=5)):
        found = predicted(model, other, Arrangement(Plan(ulysses=2)))
        assert found["denoise"] > least["denoise"] and found["decode"] >= least["decode"]
    one_branch = predicted(model, video(model, branches=1), Arrangement(Plan(ulysses=2)))
    assert one_branch["denoise"] < least["denoise"]


def test_more_ranks_take_less_time_but_not_less_than_their_part(model):
    large = video(model, LARGE)
    found = [predicted(model, large, Arrangement(Plan(ulysses=ranks)), "h100")["denoise"] for ranks in (1, 2, 4, 8)]
    for slow, fast in zip(found, found[1:]):
        assert slow / 2 < fast < slow


@pytest.mark.parametrize("options, axis", [
    ({"plan": Plan(ring=2)}, "ring"), ({"plan": Plan(ulysses=2), "fsdp": True}, "fsdp"),
    ({"plan": Plan(ulysses=2), "overlap": True}, "ulysses"),
])  # fmt: skip
def test_an_exchange_that_runs_while_a_rank_computes_takes_less_or_no_time(model, options, axis):
    large, plan, of_h100 = video(model, LARGE), Arrangement(**options), rates.of_card("h100")
    hidden, shown = (seconds.predicted(model, large, plan, MACHINE, one)["denoise"]
                     for one in (of_h100, replace(of_h100, hides=False)))  # fmt: skip
    sent = 4 * exchange.sent(model, large, plan)[axis] * of_h100.costs[axis]
    assert 0.4 < (shown - hidden) / sent <= 1.0001


def test_experts_in_turns_take_the_copy_of_one(model):
    both = replace(model, experts=(model.experts[0],) * 2)
    halves = Video(SMALL, ((0, 2),) * 2 + ((1, 2),) * 2, 512)
    resident, swapped = (predicted(both, halves, Arrangement(Plan(), experts=one)) for one in ("resident", "swap"))
    copied = work.kept_bytes(model.experts[0], model.dtype) * rates.of_card("a2").costs["swap"]
    assert swapped["denoise"] - resident["denoise"] == pytest.approx(copied)


@pytest.mark.parametrize("spec", [
    AccelerationSpec(attention_cache=AttentionCacheSpec(interval=2)),
    AccelerationSpec(block_cache=BlockCacheSpec(interval=2, first_block=1)),
    AccelerationSpec(step_cache=StepCacheSpec(method="taylorseer", interval=3)),
    AccelerationSpec(rainfusion=RainFusionSpec(sparsity=0.8)),
])  # fmt: skip
def test_what_an_accelerator_leaves_out_takes_no_time(model, spec):
    plain, fast = (predicted(model, video(model, LARGE, steps=20, acceleration=one), Arrangement(Plan(ulysses=2)))
                   for one in (AccelerationSpec(), spec))  # fmt: skip
    assert 0.3 * plain["denoise"] < fast["denoise"] < 0.95 * plain["denoise"]


def test_taylorseer_computes_the_steps_that_it_may_not_predict(model):
    spec = StepCacheSpec(method="taylorseer", interval=3, first_steps=2, last_steps=1)
    some = video(model, steps=10, acceleration=AccelerationSpec(step_cache=spec))
    parts = skipped.kept_in_steps(some, model.family.work(model.experts[0].config, exchange.step_of(
        model, some, Arrangement(Plan())).size))  # fmt: skip
    assert [step for step, part in enumerate(parts) if part.blocks == 0] == [2, 3, 5, 6, 8]


def test_every_card_has_all_costs_and_its_sources():
    for card, facts in rates.CARD_FIGURES.items():
        found = rates.of_card(card)
        assert set(found.costs) == set(rates.UNITS) and all(cost >= 0 for cost in found.costs.values())
        assert "published" not in facts.sources or facts.kind != "cpu"
        assert len(facts.sources) > 40 and 0 < facts.efficiency <= 1
    with pytest.raises(ValueError, match="one of a2, a3, 950"):
        rates.of_card("b300")


# The fit


def planted(rng, jobs, noise):
    costs = {"products": 1e-11, "linear": 3e-11, "blocks": 2e-3, "traffic": 5e-10, "steps": 0.0}
    made = []
    for number in range(jobs):
        amounts = {"products": 10 ** rng.uniform(9, 11), "linear": 10 ** rng.uniform(9, 11),
                   "blocks": float(rng.randint(1, 40)), "traffic": 10 ** rng.uniform(6, 9),
                   "steps": float(rng.randint(1, 8))}  # fmt: skip
        took = sum(amounts[unit] * cost for unit, cost in costs.items())
        made.append(fit.TimedJob(str(number), amounts, took * (1 + rng.gauss(0, noise))))
    return costs, made


def test_a_fit_finds_the_costs_of_jobs_with_noise():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    costs, jobs = planted(random.Random(seed), 60, 0.02)
    found = fit.fitted_costs(jobs)
    for unit in ("products", "linear", "blocks", "traffic"):
        assert found[unit] == pytest.approx(costs[unit], rel=0.15), unit
    assert found["steps"] < 3e-3
    assert np.median(np.abs(list(fit.errors(jobs, found).values()))) < 0.04


def test_a_disturbed_job_does_not_bend_the_others():
    costs, jobs = planted(random.Random(0), 40, 0.01)
    jobs[3] = replace(jobs[3], seconds=5 * jobs[3].seconds)
    found = fit.fitted_costs(jobs)
    errors = fit.errors([job for job in jobs if job.name != "3"], found)
    assert np.median(np.abs(list(errors.values()))) < 0.03


def test_no_cost_is_negative():
    slow, fast = {"linear": 1.0, "steps": 1.0}, {"linear": 3.0, "steps": 1.0}
    jobs = [fit.TimedJob("a", slow, 1.0), fit.TimedJob("b", fast, 0.5)]
    assert min(fit.fitted_costs(jobs).values()) >= 0
    least = fit.fitted_costs(jobs, {"linear": 0.02, "steps": 0.01})
    assert least["linear"] >= 0.02 and least["steps"] >= 0.01
    with pytest.raises(ValueError, match="nothing to fit"):
        fit.fitted_costs([])


# The profile


def entry(**changes):
    made = {"kind": "cpu", "card": "cpu", "family": "wan", "ranks": 2, "versions": profile.timed_with(),
            "costs": {"linear": 2e-11, "read": 1e-9}, "jobs": 20, "error": 0.03}  # fmt: skip
    return profile.ProfileEntry(**{**made, **changes})


def test_a_profile_gives_the_measured_rates_of_a_number_of_ranks(tmp_path):
    file = profile.profile_file(str(tmp_path))
    assert file.name == "ascend_video_profile.json" and profile.read_profile(file) == profile.Profile()
    profile.write_profile(file, profile.Profile().with_entries([entry(), entry(ranks=1, costs={"linear": 1e-11})]))
    found = profile.rates_for(str(tmp_path), "cpu", "cpu", "wan")
    assert found.on(2)["linear"] == 2e-11 and found.on(1)["linear"] == 1e-11 and "measured on this host" in found.source
    assert found.on(2)["tp"] == rates.of_card("cpu").costs["tp"]  # was not measured
    with pytest.raises(ValueError, match="measured with 1, 2 rank"):
        found.on(4)
    assert os.listdir(tmp_path) == [file.name]


def test_what_was_measured_with_other_versions_or_devices_is_not_used(tmp_path):
    file = profile.profile_file(str(tmp_path))
    profile.write_profile(file, profile.Profile().with_entries([entry(versions={"torch": "1.0"}), entry(family="x")]))
    assert profile.rates_for(str(tmp_path), "cpu", "cpu", "wan") == rates.of_card("cpu")


def test_a_new_measurement_replaces_the_one_of_the_same_devices():
    first = profile.Profile().with_entries([entry(), entry(ranks=1)])
    assert [one.jobs for one in first.with_entries([entry(jobs=30)]).entries] == [30, 20]


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{", b"\xff\xfe", b'{"form": 2, "entries": []}', b'{"entries": [{"kind": "cpu"}]}', b"[" * 100_000,
    b'{"form": 1, "entries": [], "host": "x"}', b"0" * 2**21,
])  # fmt: skip
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
    file = tmp_path / profile.PROFILE
    file.write_bytes(content)
    with pytest.raises(ValueError, match="AV-13.*ascend_video_profile.json"):
        profile.read_profile(file)


@pytest.mark.parametrize("changes", [
    {"costs": {"linear": -1.0}}, {"costs": {"linear": 1e308}}, {"costs": {"nothing known": 1.0}}, {"kind": "\x1b[31m"},
    {"card": "x" * 10_000}, {"error": -0.5}, {"ranks": "two"}, {"costs": {"linear": None}},
    {"versions": {"torch": "\n"}},
])  # fmt: skip
def test_an_entry_of_impossible_values_is_refused(tmp_path, changes):
    good = {"kind": "cpu", "card": "cpu", "family": "wan", "ranks": 2, "versions": {}, "costs": {}, "jobs": 1,
            "error": 0.1}  # fmt: skip
    file = tmp_path / profile.PROFILE
    file.write_text(json.dumps({"form": 1, "entries": [good]}))
    assert len(profile.read_profile(file).entries) == 1
    file.write_text(json.dumps({"form": 1, "entries": [good | changes]}))
    with pytest.raises(ValueError, match="is not a profile of a host"):
        profile.read_profile(file)


def test_a_profile_has_a_bounded_number_of_entries(tmp_path):
    good = {"kind": "cpu", "card": "cpu", "family": "wan", "ranks": 2, "versions": {}, "costs": {}, "jobs": 1,
            "error": 0.1}  # fmt: skip
    file = tmp_path / profile.PROFILE
    file.write_text(json.dumps({"form": 1, "entries": [good] * (profile.MOST_ENTRIES + 1)}))
    with pytest.raises(ValueError, match="more than 256"):
        profile.read_profile(file)
