"""Plans for ranks on several machines: which axes cross them, what the link costs, and what a user reads of it."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from ascend_runtime import ParallelSpec
from ascend_runtime.__main__ import main
from ascend_runtime.planner import choice, crossing, memory, models, rates, seconds
from ascend_runtime.planner.choice import Fixed
from ascend_runtime.planner.choosing import encoders, words
from ascend_runtime.planner.choosing.arrangements import plans
from ascend_runtime.planner.exchange import Exchange
from ascend_runtime.planner.facts import Arrangement, Machine, Video
from ascend_runtime.specs import AccelerationSpec, Plan, RainFusionSpec
from ascend_runtime.specs.links import MachineLink
from ascend_runtime.specs.plans import legal_plans, lines_along

TINY = str(Path(__file__).resolve().parents[2] / "assets" / "tiny_wan")
GIGABIT = MachineLink(8e-9, 8e-9, 1e-4)
EVEN, UNEVEN, THREE = (0,) * 8 + (1,) * 8, (0,) * 8 + (1,) * 4, (0,) * 4 + (1,) * 4 + (2,) * 4
ONE = Machine("npu", "a2", 8, 60 * 10**9, 10**12)
A2 = rates.of_card("a2")


def machine(hosts, link=GIGABIT):
    return replace(ONE, ranks=len(hosts), hosts=hosts, link=link)


@pytest.fixture(scope="module")
def wan():
    return replace(models.published("Wan2.1-T2V-14B"), vae=None)  # whose FLOPs take seconds to count


@pytest.fixture(scope="module")
def hunyuan():
    return replace(models.published("HunyuanVideo"), vae=None)


def video(model, branches=2, **more):
    return Video((1, 16, 5, 60, 104), ((0, branches),) * 4, model.family.text_tokens, **more)


def chosen(model, on, fixed=Fixed(), branches=2, **more):
    return choice.choice_of(model, video(model, branches, **more), on, A2, fixed, memory.roughly)


# Which ranks an axis joins


def test_lines_join_ranks_that_differ_along_an_axis_only():
    plan = Plan(cfg=2, ring=2, ulysses=3, tp=2)
    for axes in (("cfg",), ("ring",), ("ulysses",), ("tp",), ("ring", "ulysses")):
        lines = plan.lines(*axes)
        assert sorted(rank for line in lines for rank in line) == list(range(24))
        for line in lines:
            assert line == tuple(sorted(line)) and len({places(plan, rank, axes) for rank in line}) == 1
    assert lines_along((2, 3), (0, 1)) == (tuple(range(6)),)


def places(plan, rank, axes):
    """A rank's place along the other axes."""
    found = {}
    for axis, degree in reversed(list(zip(("cfg", "ring", "ulysses", "tp"), plan.degrees))):
        rank, found[axis] = divmod(rank, degree)
    return tuple(at for axis, at in sorted(found.items()) if axis not in axes)


def test_inner_axes_stay_within_machines_wherever_they_can():
    assert Plan(cfg=2, ulysses=8).is_within(EVEN) and not Plan(ulysses=16).is_within(EVEN)
    assert not Plan(ring=2, ulysses=6).is_within(UNEVEN) and Plan(ring=3, ulysses=4).is_within(UNEVEN)
    assert not Plan(cfg=2, ulysses=2, tp=4, ring=1).is_within((0, 0, 1, 1) * 4)
    assert all(plan.is_within(()) for plan in legal_plans(16))


@pytest.mark.parametrize("plan, hosts, without", [
    (Plan(cfg=2, ulysses=8), EVEN, Plan(ring=2, ulysses=8)), (Plan(cfg=2, ulysses=8), (), Plan(ulysses=16)),
    (Plan(cfg=2, ring=2, ulysses=4), EVEN, Plan(ring=2, ulysses=8)), (Plan(ring=2, ulysses=8), EVEN, None),
    (Plan(cfg=2, ring=4, ulysses=2), EVEN, Plan(ring=4, ulysses=4)), (Plan(ulysses=16), EVEN, None),
    (Plan(cfg=2, ulysses=6), UNEVEN, Plan(ring=2, ulysses=6)),
])  # fmt: skip
def test_without_guidance_the_cfg_ranks_join_ulysses_unless_it_would_cross_machines(plan, hosts, without):
    assert plan.unguided(hosts) == (without or plan)


# What goes between machines


def leaving(operation, plan, axes, hosts):
    """What each rank sends to other machines of what it sends, counted peer by peer."""
    found = Counter()
    for line in plan.lines(*axes):
        for number, rank in enumerate(line):
            if operation == "all_to_all":
                peers = [other for other in line if other != rank]
                found[rank] = sum(hosts[rank] != hosts[peer] for peer in peers) / len(peers)
            else:
                found[rank] = float(hosts[rank] != hosts[line[(number + 1) % len(line)]])
    return found


@pytest.mark.parametrize("operation, axis, axes", [
    ("all_to_all", "ulysses", ("ulysses",)), ("send", "ring", ("ring",)), ("all_gather", "cfg", ("cfg",)),
    ("all_gather", "sequence", ("ring", "ulysses")), ("all_reduce", "tp", ("tp",)),
    ("send", "fsdp", ("cfg", "ring", "ulysses")),
])  # fmt: skip
def test_what_crosses_is_what_ranks_send_to_those_of_other_machines(operation, axis, axes):
    made = (Plan(cfg=2, ring=3, ulysses=2), Plan(ring=2, ulysses=3, tp=2), Plan(cfg=2, ulysses=8),
            Plan(ring=4, ulysses=2, tp=2))  # fmt: skip
    for hosts, plan in product((EVEN, UNEVEN, THREE), made):
        degree = 1
        for one in axes:
            degree *= getattr(plan, one)
        if len(hosts) != plan.cfg * plan.ring * plan.ulysses * plan.tp or degree == 1:
            continue
        found = crossing.crossing(Exchange(axis, operation, 1000, 1), plan, hosts)
        ranks = leaving(operation, plan, axes, hosts)
        machines = [sum(share for rank, share in ranks.items() if hosts[rank] == host) for host in set(hosts)]
        assert found.of_rank == pytest.approx(1000 * max(ranks.values()))
        assert found.of_machine == pytest.approx(1000 * max(machines))


def test_what_stays_within_a_machine_takes_what_it_took(wan):
    """The link costs nothing where nothing crosses it: a ring of 2 x 4 ranks, of which each machine has a whole."""
    plan = Arrangement(Plan(cfg=2, ulysses=8))
    far, near = (seconds.predicted(wan, video(wan), plan, on, A2) for on in (machine(EVEN), replace(ONE, ranks=16)))
    sent = crossing.between(wan, video(wan), plan, machine(EVEN))
    assert far["denoise"] - near["denoise"] == pytest.approx(4 * sent.seconds, rel=0.05)
    assert {stage: far[stage] for stage in ("load", "decode")} == {stage: near[stage] for stage in ("load", "decode")}


def test_a_link_that_is_as_fast_as_those_within_costs_nothing_but_its_delay(wan):
    fast = MachineLink(1e-15, 1e-15, 0.0)
    plan = Arrangement(Plan(ring=2, ulysses=8))
    far, near = (seconds.predicted(wan, video(wan), plan, on, A2)["denoise"]
                 for on in (machine(EVEN, fast), replace(ONE, ranks=16)))  # fmt: skip
    assert far == pytest.approx(near)


def test_one_rank_that_sends_and_all_that_do_are_as_fast_as_was_measured():
    """Eight links of a machine, of which one rank uses one."""
    link = MachineLink(8e-9 / 200, 8e-9 / 1600, 0.0)
    assert link.seconds(1e9, 1e9) == pytest.approx(0.04) and link.seconds(1e9, 8e9) == pytest.approx(0.04)
    assert str(link) == "the measured 1600 Gbit/s" and str(GIGABIT) == "the measured 1 Gbit/s"


def test_shards_are_gathered_over_the_link_and_read_once(wan):
    whole, shards = (Arrangement(Plan(cfg=2, ulysses=8), fsdp=fsdp) for fsdp in (False, True))
    far = [seconds.predicted(wan, video(wan), one, machine(EVEN), A2) for one in (whole, shards)]
    near = seconds.predicted(wan, video(wan), shards, replace(ONE, ranks=16), A2)
    sent = crossing.between(wan, video(wan), shards, machine(EVEN))
    assert far[1]["denoise"] > near["denoise"] + 3.5 * sent.seconds > near["denoise"] + 100
    assert far[1]["load"] < near["load"] and far[1]["load"] < far[0]["load"]


# The choice


def test_no_plan_that_is_chosen_has_inner_axes_across_machines(wan, hunyuan):
    for model, hosts, branches in product((wan, hunyuan), (EVEN, UNEVEN, THREE), (1, 2)):
        made = chosen(model, machine(hosts), branches=branches)
        assert made.fitting and all(one.arrangement.plan.is_within(hosts) for one in made.fitting)


def test_cfg_crosses_machines_rather_than_a_ring_and_a_ring_rather_than_shards(wan):
    first = chosen(wan, machine(EVEN)).fitting
    assert [one.arrangement.plan for one in first[:2]] == [Plan(cfg=2, ulysses=8)] * 2
    assert not first[0].arrangement.fsdp and chosen(wan, machine(EVEN), branches=1).chosen.arrangement == Arrangement(
        Plan(ring=2, ulysses=8), encoder="cpu")  # fmt: skip


def test_text_encoders_stay_on_a_cpu_where_a_slow_link_would_carry_their_weights(wan):
    assert chosen(wan, machine(EVEN)).chosen.arrangement.encoder == "cpu"
    fast = MachineLink(8e-9 / 1600, 8e-9 / 1600, 1e-5)
    assert chosen(wan, machine(EVEN, fast)).chosen.arrangement.encoder == "ranks"
    assert [encoders.place(wan.encoders, machine(EVEN, link), A2) for link in (GIGABIT, fast)] == ["cpu", "ranks"]


def test_sparse_attention_keeps_the_tokens_of_a_head_on_a_rank(wan):
    """RainFusion refuses a ring; what is left without guidance crosses machines."""
    sparse = AccelerationSpec(rainfusion=RainFusionSpec(sparsity=0.8))
    for branches, plan in ((2, Plan(cfg=2, ulysses=8)), (1, Plan(ulysses=16))):
        assert set(plans(wan, video(wan, branches, acceleration=sparse), machine(EVEN), ParallelSpec())) == {plan}


def warning(model, hosts, branches=2, **degrees):
    """(what is predicted of a plan that was set, the warning, the line)"""
    on, fixed = machine(hosts), Fixed(ParallelSpec(**degrees))
    made = chosen(model, on, fixed, branches)
    said = choice.crossing_warning(made.chosen, model, video(model, branches), on, A2, fixed, memory.roughly)
    return made.chosen, said, made.line


def test_a_plan_that_was_set_runs_with_a_warning_that_has_its_cost(wan, hunyuan):
    for model, branches, degrees, better in (
        (wan, 2, {"cfg_degree": 1, "ulysses_degree": 16}, "CFG 2 x Ulysses 8"),
        (hunyuan, 1, {"ulysses_degree": 16}, "ring 2 x Ulysses 8"),
    ):
        one, said, line = warning(model, EVEN, branches, **degrees)
        assert one.arrangement.plan == Plan(ulysses=16) and 10 < one.between.seconds < 600
        cost = f"{one.between.sent / 1e9:.1f} GB a step between machines, about {words.duration(one.between.seconds)}"
        assert said.startswith(f"Ulysses 16 crosses machines: the plan sends {cost} at the measured 1 Gbit/s. ")
        assert f" {better} would send " in said and cost in line


def test_a_plan_whose_inner_axes_stay_within_machines_is_not_warned_of(wan, hunyuan):
    assert warning(hunyuan, EVEN, 1, ulysses_degree=4, ring_degree=2, tp_degree=2)[1] == ""
    assert warning(wan, EVEN)[1] == ""


def test_a_tensor_degree_that_crosses_machines_is_warned_of(wan):
    _, said, _ = warning(wan, (0, 0, 1, 1), tp_degree=4)
    assert said.startswith("TP 4 crosses machines: ") and "CFG 2 x Ulysses 2 would send" in said


# Memory


def test_a_host_holds_what_its_own_ranks_do(wan):
    """Latents of its ranks, all frames, and rank 0's text encoder."""
    arrangement = Arrangement(Plan(cfg=2, ulysses=8))
    one, two = (memory.roughly(wan, video(wan), arrangement, on).host
                for on in (replace(ONE, ranks=16), machine(EVEN)))  # fmt: skip
    assert one["latents"] == 2 * two["latents"] and one["frames"] == two["frames"]
    assert one["text encoder"] == two["text encoder"]
    spread = Arrangement(Plan(ring=3, ulysses=4))
    one, two = (memory.roughly(wan, video(wan), spread, on).host for on in (replace(ONE, ranks=12), machine(UNEVEN)))
    assert 8 * one["latents"] == 12 * two["latents"], "of the host with 8 ranks"


def test_on_cpus_a_host_gives_memory_to_its_own_ranks_only():
    host = replace(machine((0, 0, 1)), kind="cpu", device_memory=5, host_memory=12)
    taken = choice.Memory({"denoise": {"weights": 5}}, {"frames": 2})
    assert choice.fits(taken, host) and not choice.fits(taken, replace(host, hosts=(0, 0, 0)))


# The command


@pytest.fixture
def planned(monkeypatch, capsys):
    """`planned(*arguments)`: (exit status, stdout and stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ascend_runtime", "plan", *arguments, "--card", "a2"])
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        return status, "".join(capsys.readouterr())

    return run


def test_cables_can_be_planned_before_they_are_bought(planned):
    options = ("--parallel", "cfg_degree=1,ulysses_degree=4,fsdp=false", "--size", "256x256", "--frames", "5")
    status, said = planned(TINY, "--machines", "2", "--link", "25", "--ranks", "4", *options)
    assert status == 0 and "2 with 2 card(s) each" in said and "GB link: by a machine to others in a step" in said
    assert "chosen: Ulysses 4" in said and "at the given 25 Gbit/s" in said
    assert "warning: Ulysses 4 crosses machines" in said and "CFG 2 x Ulysses 2 would send" in said


@pytest.mark.parametrize("options, refusal", [
    (["--machines", "2"], "--machines needs --link"), (["--machines", "3", "--ranks", "16", "--link", "25"], "divides"),
    (["--machines", "0"], "--machines is 0"), (["--machines", "2", "--link", "0"], "--link is 0"),
    (["--machines", "2", "--link", "nan"], "--link is nan"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(planned, options, refusal):
    status, said = planned("Wan2.1-T2V-1.3B", *options)
    assert status and refusal in said
