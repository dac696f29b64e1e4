"""How well the planner predicts on this host, after `plan --measure`'s own measurement of it.

Networks of both families with random weights: jobs that were not measured, in widths, sizes and plans of their own, in
turns; and for some jobs, all plans, to see whether the chosen one is about the fastest.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from ascend_runtime import ParallelSpec, Runtime, VaeSpec
from ascend_runtime.commands.measuring import networks
from ascend_runtime.commands.measuring.measure import Subject, measure
from ascend_runtime.commands.measuring.trials import Decoding, Trial, with_network
from ascend_runtime.models.family import TRANSFORMER, VAE
from ascend_runtime.planner import models, seconds
from ascend_runtime.planner.choosing.arrangements import Fixed, plans
from ascend_runtime.planner.facts import Arrangement, Machine, Model
from ascend_runtime.planner.rates import Rates
from ascend_runtime.planner.timing.profile import rates_for
from ascend_runtime.specs import AccelerationSpec, Plan
from ascend_runtime.specs.presets import chosen
from tqdm import tqdm

from .report import Row, context_of

PUBLISHED = {"wan": "Wan2.1-T2V-1.3B", "hunyuan_video": "HunyuanVideo"}
NARROWER = {"wan": {"base_dim": 24}, "hunyuan_video": {"block_out_channels": (32, 64, 64, 64)}}  # of the VAEs
HEADS = 4  # of the measured networks; published heads are 128 wide
MEASURED_SECONDS, QUICK_SECONDS = 60.0, 1.0  # of a family
RANKS, QUICK_RANKS = (1, 2, 4), (1, 2)
ROUNDS, CHOICE_ROUNDS = 5, 3
MOST_ERROR, NEAR = 0.15, 1.1
PLENTY = 2**40  # bytes: what is chosen here is fast, and not what fits

ONE, TWO, FOUR = Plan(), {"cfg": Plan(cfg=2), "ulysses": Plan(ulysses=2), "ring": Plan(ring=2), "tp": Plan(tp=2)}, {
    "cfg x ulysses": Plan(cfg=2, ulysses=2), "ring x ulysses": Plan(ring=2, ulysses=2), "cfg x tp": Plan(cfg=2, tp=2),
    "ulysses": Plan(ulysses=4),
}  # fmt: skip
TAYLOR = AccelerationSpec(step_cache=chosen("step_cache", method="taylorseer", interval=3))
REUSED = AccelerationSpec(attention_cache=chosen("attention_cache", interval=2, start=1, end=6))


@dataclass(frozen=True)
class Job:
    """A trial, or a decoded latent, of so many ranks. features: what it has in common with others, to see where the
    formula errs."""

    trial: Trial | Decoding
    ranks: int
    features: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        return "decode" if isinstance(self.trial, Decoding) else "denoise"

    def predicted(self, rates: Mapping[str, Rates]) -> float:
        amounts = self.trial.sample(1.0).amounts
        return seconds.total(amounts, rates[self.trial.model.family.name].on(self.ranks))


@dataclass
class Bench:
    """Networks in a folder, by family, heads and blocks, and running ranks by their number."""

    folder: Path
    runtimes: dict[int, Runtime] = field(default_factory=dict)
    made: dict[tuple, tuple[Model, str]] = field(default_factory=dict)
    subjects: dict[str, Subject] = field(default_factory=dict)

    def subject(self, family: str) -> Subject:
        """What is measured: a model with a narrow VAE, whose transformer is HEADS wide."""
        if family not in self.subjects:
            model = models.published(PUBLISHED[family], "cpu")
            config = model.family.smaller(model.experts[0].config, HEADS, 8)
            vae = networks.written(self.folder / family / "vae", model.family, VAE,
                                   {**model.vae.config, **NARROWER[family]})  # fmt: skip
            small = replace(model.experts[0], config=config)
            model = replace(model, experts=(small,), dtype="float32", text_dtype="float32", vae=vae,
                            vae_dtype="float32", encoders=())  # fmt: skip
            path = str(self.folder / family)
            self.subjects[family] = Subject(model, path, VaeSpec(path=str(self.folder / family / "vae")), "cpu")
        return self.subjects[family]

    def network(self, family: str, heads: int, blocks: int) -> tuple[Model, str]:
        key = family, heads, blocks
        if key not in self.made:
            model, path = self.subject(family).model, self.folder / "-".join(map(str, key))
            network = networks.transformer(path, model.family, model.experts[0], heads, blocks)
            assert network.part == TRANSFORMER
            self.made[key] = with_network(model, network), str(path)
        return self.made[key]

    def runtime(self, ranks: int) -> Runtime:
        return self.runtimes[ranks]


def run(quick: bool) -> Iterator[Row]:
    ranks = QUICK_RANKS if quick else RANKS
    with tempfile.TemporaryDirectory(prefix="ascend_video_") as folder, ExitStack() as stack:
        bench = Bench(Path(folder))
        rates = {family: _measured(bench.subject(family), family, ranks, quick) for family in PUBLISHED}
        for number in ranks:
            bench.runtimes[number] = stack.enter_context(Runtime(ParallelSpec(ranks=number), device="cpu"))
        yield from _errors(bench, rates, quick)
        yield _choices(bench, rates, quick)


def _measured(subject: Subject, family: str, ranks: Sequence[int], quick: bool) -> Rates:
    """As `python -m ascend_runtime plan MODEL --measure`; read from the profile that it writes."""
    measure(subject, ranks, "cpu", QUICK_SECONDS if quick else MEASURED_SECONDS)
    return rates_for(subject.path, "cpu", "cpu", family)


# Jobs that were not measured


def _errors(bench: Bench, rates: Mapping[str, Rates], quick: bool) -> Iterator[Row]:
    jobs = list(_jobs(bench))
    jobs = [job for job in jobs if job.ranks in bench.runtimes][:: 4 if quick else 1]
    took = _medians(bench, jobs, 1 if quick else ROUNDS, "jobs not measured")
    errors, features, spread = {}, defaultdict(list), []
    for job, (middle, wide) in zip(jobs, took):
        error = job.predicted(rates) / middle - 1
        errors[f"{job.trial.name}, {', '.join(job.features)}"] = error
        spread.append(wide)
        for feature in (*job.features, f"{job.ranks} ranks", job.trial.model.family.name):
            features[feature].append(error)
        print(f"{job.trial.name}: predicted {job.predicted(rates):.3f} s, took {middle:.3f} s: {error:+.0%}, "
              f"spread {wide:.0%}")  # fmt: skip
    for feature, found in sorted(features.items()):
        print(f"{feature}: median error {median(found):+.0%} of {len(found)} job(s)")
    worst = max(errors, key=lambda name: abs(errors[name]))
    context = context_of(
        quick, jobs=len(jobs), rounds=1 if quick else ROUNDS, worst=f"{errors[worst]:+.0%}: {worst}",
        spread=round(median(spread), 3), by_feature={name: round(median(found), 3) for name, found in features.items()},
    )  # fmt: skip
    value = median(map(abs, errors.values()))
    yield Row(name="plan.median_off", value=value, unit="ratio", better="lower", baseline=MOST_ERROR,
              context=context)  # fmt: skip
    yield Row(name="plan.worst_off", value=abs(errors[worst]), unit="ratio", better="lower", baseline=MOST_ERROR,
              context={**context, "not_compared": "the bar is for the median"})  # fmt: skip


def _jobs(bench: Bench) -> Iterator[Job]:
    """Twenty jobs on one, two and four ranks."""

    def job(family: str, heads: int, blocks: int, size: tuple[int, int, int], steps: int, plan: Plan, *features: str,
            branches: int = 2, **more) -> Job:  # fmt: skip
        one = Trial(*bench.network(family, heads, blocks), size, steps, Arrangement(plan, **more), branches)
        return Job(one, plan.cfg * plan.ring * plan.ulysses * plan.tp, features)

    def decoded(family: str, size: tuple[int, int, int], ranks: int) -> Job:
        subject = bench.subject(family)
        return Job(Decoding(subject.model, subject.vae, size, Arrangement(Plan(ulysses=ranks))), ranks, ("VAE",))

    def accelerated(one: Job, acceleration: AccelerationSpec, feature: str) -> Job:
        return replace(one, trial=replace(one.trial, acceleration=acceleration), features=(feature,))

    yield job("wan", 3, 5, (2, 24, 40), 3, ONE, "plain")
    yield job("wan", 6, 2, (5, 16, 24), 2, ONE, "wider")
    yield job("hunyuan_video", 3, 5, (4, 20, 20), 2, ONE, "plain")
    yield job("hunyuan_video", 5, 3, (2, 24, 32), 3, ONE, "one branch", branches=1)
    yield accelerated(job("wan", 4, 4, (3, 20, 28), 8, ONE), TAYLOR, "taylorseer")
    yield decoded("wan", (2, 10, 14), 1)
    yield job("wan", 4, 4, (4, 24, 24), 3, TWO["cfg"], "cfg")
    yield job("wan", 6, 2, (3, 28, 20), 2, TWO["ulysses"], "ulysses")
    yield job("hunyuan_video", 4, 4, (3, 24, 20), 2, TWO["ring"], "ring")
    yield job("wan", 4, 5, (2, 24, 32), 2, TWO["tp"], "tp")
    yield job("hunyuan_video", 6, 3, (3, 20, 24), 2, TWO["ulysses"], "fsdp", fsdp=True)
    yield job("hunyuan_video", 4, 5, (2, 28, 28), 2, TWO["cfg"], "cfg")
    yield job("wan", 4, 5, (4, 20, 24), 2, TWO["ulysses"], "overlap", overlap=True)
    yield accelerated(job("hunyuan_video", 4, 4, (3, 20, 20), 8, TWO["ulysses"]), REUSED, "attention_cache")
    yield decoded("hunyuan_video", (2, 12, 16), 2)
    yield job("wan", 6, 3, (3, 24, 28), 2, TWO["ring"], "ring gather", ring_exchange="gather")
    yield job("wan", 4, 4, (3, 28, 28), 2, FOUR["cfg x ulysses"], "cfg x ulysses")
    yield job("hunyuan_video", 8, 3, (3, 20, 24), 2, FOUR["ulysses"], "ulysses")
    yield job("wan", 4, 5, (3, 24, 24), 2, FOUR["ring x ulysses"], "ring x ulysses")
    yield job("hunyuan_video", 4, 4, (2, 24, 32), 2, FOUR["cfg x tp"], "cfg x tp")


def _medians(bench: Bench, jobs: Sequence[Job], rounds: int, what: str) -> list[tuple[float, float]]:
    """(the median of each job's seconds, and the spread of its middle half relative to it), in turns after a round
    that does not count."""
    took: list[list[float]] = [[] for _ in jobs]
    for _ in tqdm(range(rounds + 1), desc=what):
        for found, job in zip(took, jobs):
            found.append(job.trial.run(bench.runtime(job.ranks)))
    return [(median(found[1:]), _spread(sorted(found[1:]))) for found in took]


def _spread(found: Sequence[float]) -> float:
    quarter = len(found) // 4
    return (found[-1 - quarter] - found[quarter]) / median(found)


# The chosen plan


def _choices(bench: Bench, rates: Mapping[str, Rates], quick: bool) -> Row:
    """All plans of each job, and the one with the least predicted seconds."""
    good, notes = 0, []
    cases = [case for case in _cases() if case[-1] in bench.runtimes][: 1 if quick else None]
    for family, heads, blocks, size, branches, ranks in cases:
        trial = Trial(*bench.network(family, heads, blocks), size, 2, Arrangement(Plan()), branches)
        jobs = [Job(replace(trial, arrangement=Arrangement(plan)), ranks) for plan in _plans(trial, ranks)]
        took = [middle for middle, _ in _medians(bench, jobs, 1 if quick else CHOICE_ROUNDS, "all plans")]
        choice = min(range(len(jobs)), key=lambda number: jobs[number].predicted(rates))
        ratio = took[choice] / min(took)
        good += ratio <= NEAR
        plan, best = (jobs[number].trial.arrangement.plan for number in (choice, took.index(min(took))))
        notes.append(f"{family} {heads} heads {size} on {ranks}: chose {plan}, best {best}, {ratio:.2f} x its time")
        print(notes[-1])
    context = context_of(quick, cases=len(cases), rounds=1 if quick else CHOICE_ROUNDS, chosen=notes)
    return Row(name="plan.chosen_near_best", value=float(good), unit="jobs", better="higher",
               baseline=float(len(cases) - len(cases) // 10), context=context)  # fmt: skip


def _plans(trial: Trial, ranks: int) -> list[Plan]:
    machine = Machine("cpu", "cpu", ranks, PLENTY, PLENTY)
    return plans(trial.model, trial.video, machine, Fixed().parallel)


def _cases() -> Iterator[tuple]:
    """(family, heads, blocks, size, branches, ranks)"""
    yield "wan", 4, 3, (3, 20, 24), 2, 2
    yield "hunyuan_video", 4, 3, (3, 20, 20), 2, 2
    yield "wan", 6, 2, (2, 24, 24), 1, 2
    yield "hunyuan_video", 6, 3, (2, 16, 24), 1, 2
    yield "wan", 3, 4, (4, 24, 28), 2, 2
    yield "wan", 4, 3, (3, 24, 28), 2, 4
    yield "hunyuan_video", 4, 3, (2, 24, 28), 2, 4
    yield "wan", 8, 2, (2, 20, 24), 1, 4
    yield "hunyuan_video", 8, 2, (3, 16, 20), 1, 4
    yield "wan", 4, 5, (2, 16, 16), 2, 4
