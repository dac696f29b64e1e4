"""Runs small jobs on this host, fits the planner's costs to their seconds, and keeps them in a profile.

For each number of ranks: denoise loops of two networks of the model's family, one as wide as the model if its weights
are not too large, and one half as wide, in several sizes and one plan for each axis of the mesh; decoded latents; and
loaded networks. Jobs run in turns, and the median of each counts.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ...client.group import RankDied
from ...client.runtime import Runtime
from ...client.submission import RankError
from ...models.family import TRANSFORMER
from ...planner import rates
from ...planner.facts import Arrangement, Model, Network
from ...planner.timing.fit import TimedJob, errors, fitted_costs
from ...planner.timing.profile import (
    Profile,
    ProfileEntry,
    check_writable,
    profile_file,
    read_profile,
    timed_with,
    write_profile,
)
from ...planner.timing.work import kept_bytes
from ...specs import ParallelSpec, Plan, VaeSpec
from . import host, networks
from .trials import Decoding, Trial, one_for_each_axis, request_of, with_network

SECONDS = 120.0  # for all jobs, without the start of ranks
LARGEST_PART = 150  # of all seconds: the largest job with the fewest ranks
SIDES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192)  # of a latent of LATENT_FRAMES frames
LATENT_FRAMES = 3
DECODED = ((1, 8, 8), (2, 8, 8), (3, 12, 12), (3, 16, 24), (5, 32, 32), (5, 48, 64), (9, 64, 96))
WIDE_BLOCKS, NARROW_BLOCKS = 3, 6
MOST_WEIGHTS = 2**28  # bytes of a network
DEEP_WEIGHTS, DEEPEST = 2**25, 12  # bytes, blocks of one that is only loaded
ROUNDS = 5

Report = Callable[[str], object]


@dataclass
class Measured:
    """samples: by the number of ranks. costs: what was fitted to them."""

    samples: dict[int, list[TimedJob]] = field(default_factory=dict)
    costs: dict[int, dict[str, float]] = field(default_factory=dict)

    def error(self, ranks: int) -> float:
        """The median relative error of the fit."""
        return median(map(abs, errors(self.samples[ranks], self.costs[ranks]).values()))


@dataclass(frozen=True)
class Subject:
    """What is measured. model: with its VAE, if `vae` is given. path: of the model's files, on the disk to measure.
    start: makes a number of ranks for the measurement; None: new ones on `device`."""

    model: Model
    path: str
    vae: VaeSpec | None = None
    device: str = "auto"
    start: Callable[[int], AbstractContextManager[Runtime]] | None = None

    def ranks(self, number: int) -> AbstractContextManager[Runtime]:
        if self.start is not None:
            return self.start(number)
        return Runtime(ParallelSpec(ranks=number), device=self.device)


def measure(
    subject: Subject,
    ranks: Sequence[int] = (1, 2),
    card: str = "cpu",
    seconds: float = SECONDS,
    report: Report = print,
) -> Profile:
    """Measures with each number of ranks, and writes the profile next to the model. Returns the profile.

    card: the product line of the devices. seconds: for all jobs, besides the start of ranks. report: gets lines of
    text. Raises ValueError if a profile that is there is invalid, or ranks fail; OSError if it cannot be written.
    """
    file = profile_file(subject.path)
    profile = read_profile(file)  # refuses an invalid one before anything runs
    check_writable(file)
    try:
        measured = measured_on(subject, ranks, card, seconds, report)
    except (RankError, RankDied) as error:
        raise ValueError(str(error)) from error
    kind = rates.CARD_FIGURES[card].kind
    entries = [
        ProfileEntry(
            kind=kind, card=card, family=subject.model.family.name, ranks=number, versions=timed_with(), costs=costs,
            jobs=len(measured.samples[number]), error=measured.error(number),
        )
        for number, costs in measured.costs.items()
    ]  # fmt: skip
    profile = profile.with_entries(entries)
    write_profile(file, profile)
    return profile


def measured_on(
    subject: Subject, ranks: Sequence[int], card: str = "cpu", seconds: float = SECONDS, report: Report = print
) -> Measured:
    """Runs the jobs with each number of ranks and fits their costs. seconds: for all jobs together."""
    measured, of_host = Measured(), _host_costs(subject)
    least = _least_costs(subject, card)
    with tempfile.TemporaryDirectory(prefix="ascend_video_") as folder:
        bench = Bench(subject, Path(folder), seconds / LARGEST_PART, report)
        for number in sorted(ranks):
            samples = bench.samples(number, seconds / len(ranks))
            measured.samples[number] = samples
            costs = fitted_costs(samples, least)
            measured.costs[number] = {**costs, "encode_ranks": costs["linear"], **of_host}
            report(f"{number} rank(s): {len(samples)} jobs, median error of the fit {measured.error(number):.1%}")
    return measured


class Bench:
    """The networks of a measurement, and how large its jobs are. target: seconds of the largest ones."""

    def __init__(self, subject: Subject, folder: Path, target: float, report: Report):
        self._subject, self._folder, self._target, self._report = subject, folder, target, report
        model = subject.model
        wide = _heads_within(model, MOST_WEIGHTS)
        self._wide = self._network("wide", wide, WIDE_BLOCKS)
        self._narrow = self._network("narrow", max(1, wide // 2), NARROW_BLOCKS)
        self._deep = self._network("deep", wide, _deep_blocks(_bytes(model, wide, 1)))
        self._sizes: tuple[tuple[int, int, int], ...] = ()  # small, medium, large, long; found with the first ranks
        self._decoded: tuple[tuple[int, int, int], ...] = ()

    def samples(self, ranks: int, seconds: float) -> list[TimedJob]:
        """The medians of all jobs with this number of ranks, which take this long together."""
        with self._subject.ranks(ranks) as runtime:
            self._report(f"{ranks} rank(s) on {runtime.device}")
            loaded = list(self._loaded(runtime, ranks))
            self._find_sizes(runtime, ranks)
            trials = sorted(self._trials(ranks), key=_placed) + list(self._decodings(ranks))
            return loaded + _medians(runtime, trials, seconds)

    def _network(self, name: str, heads: int, blocks: int) -> tuple[Model, str]:
        model, folder = self._subject.model, self._folder / name
        network = networks.transformer(folder, model.family, model.experts[0], heads, blocks)
        return with_network(model, network), str(folder)

    def _find_sizes(self, runtime: Runtime, ranks: int) -> None:
        """Chooses sizes whose largest jobs take about as long as intended."""
        if self._sizes:
            return
        first = Arrangement(Plan(ulysses=ranks))
        sizes = [(LATENT_FRAMES, side, side) for side in SIDES]
        found = _up_to(self._target, sizes[:-1], lambda size: Trial(*self._wide, size, 1, first).run(runtime))
        self._sizes = *found, sizes[sizes.index(found[-1]) + 1]
        if self._subject.vae is not None:
            model, vae = self._subject.model, self._subject.vae
            self._decoded = _up_to(self._target, DECODED, lambda size: Decoding(model, vae, size, first).run(runtime))

    def _trials(self, ranks: int) -> Iterator[Trial]:
        small, medium, large, long = self._sizes
        heads = math.gcd(*(_heads(model) for model, _ in (self._wide, self._narrow)))
        for number, arrangement in enumerate(one_for_each_axis(ranks, heads)):
            yield Trial(*self._wide, large, 1, arrangement)
            if number == 0 or arrangement.plan.ring > 1:  # to see attention, which grows fastest
                yield Trial(*self._narrow, long, 1, arrangement)
            yield Trial(*self._narrow, medium, 2, arrangement)
            yield Trial(*self._narrow, small, 2, arrangement)
            if number == 0:
                yield Trial(*self._narrow, large, 1, arrangement)
                yield Trial(*self._wide, medium, 1, arrangement)
                yield Trial(*self._wide, small, 6, arrangement)
                yield Trial(*self._narrow, small, 10, arrangement)
        yield Trial(*self._wide, medium, 2, Arrangement(Plan(ulysses=ranks)), branches=1)

    def _decodings(self, ranks: int) -> Iterator[Decoding]:
        for size in self._decoded:
            yield Decoding(self._subject.model, self._subject.vae, size, Arrangement(Plan(ulysses=ranks)))

    def _loaded(self, runtime: Runtime, ranks: int) -> Iterator[TimedJob]:
        """Loads networks whose files are in memory. The first one, with which ranks import what they need, does not
        count."""
        for number, (model, path) in enumerate((self._narrow, self._wide, self._deep)):
            trial = Trial(model, path, (1, 8, 8), 1, Arrangement(Plan(ulysses=ranks)))
            took = runtime.load(trial.spec, parallel=request_of(trial.arrangement)).seconds["load"]
            if number:
                copied = float(kept_bytes(model.experts[0], model.dtype))
                yield TimedJob(f"load {copied / 1e6:.0f} MB", {"load_job": 1, "copied": copied}, took)


def _placed(trial: Trial) -> tuple:
    """Jobs whose weights lie alike follow each other, so that ranks load them seldom."""
    return trial.arrangement.fsdp, trial.arrangement.plan.tp, trial.path


def _medians(runtime: Runtime, trials: Sequence[Trial | Decoding], seconds: float) -> list[TimedJob]:
    """The jobs in turns, after a round that does not count; fewer rounds if they take more than `seconds`."""
    took: list[list[float]] = [[] for _ in trials]
    end, longest = time.monotonic() + seconds, 0.0
    for number in range(ROUNDS + 1):
        start = time.monotonic()
        for found, trial in zip(took, trials):
            found.append(trial.run(runtime))
        longest = max(longest, time.monotonic() - start)
        if number and time.monotonic() + longest > end:
            break
    return [trial.sample(median(found[1:])) for found, trial in zip(took, trials)]


def _up_to(target: float, sizes: Sequence, seconds: Callable) -> tuple:
    """Three of the sizes: the first that takes this long, and the two before it."""
    for number, size in enumerate(sizes):
        seconds(size)  # the first job of a size allocates
        if number >= 2 and seconds(size) >= target:
            break
    return tuple(sizes[number - 2 : number + 1])


def _heads_within(model: Model, most: int) -> int:
    """The number of heads of the widest network that takes at most this many bytes; the model's own at most."""
    heads = _heads(model)
    while heads > 2 and _bytes(model, heads, WIDE_BLOCKS) > most:
        heads //= 2
    return heads


def _bytes(model: Model, heads: int, blocks: int) -> int:
    config = model.family.smaller(model.experts[0].config, heads, blocks)
    parameters = model.family.network(TRANSFORMER, config).named_parameters()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    return kept_bytes(Network(TRANSFORMER, config, shapes), "float32")


def _deep_blocks(block: int) -> int:
    """Of a network that is only loaded: clearly more bytes than the wide one has. block: its bytes."""
    return max(2 * WIDE_BLOCKS, min(DEEPEST, WIDE_BLOCKS + DEEP_WEIGHTS // block))


def _heads(model: Model) -> int:
    return model.family.heads(model.experts[0].config)


def _host_costs(subject: Subject) -> dict[str, float]:
    found = {"encode": host.product_cost(subject.model.text_dtype), "read": host.disk_cost(subject.path)}
    return {unit: cost for unit, cost in found.items() if cost is not None}


def _least_costs(subject: Subject, card: str) -> dict[str, float]:
    """Of a FLOP of matrix products: at the card's peak; on a CPU, half of what it takes all cores outside of ranks.

    Small jobs may not show what attention costs, which dominates large ones.
    """
    figures = rates.CARD_FIGURES[card]
    flop = host.product_cost(subject.model.dtype) / 2 if figures.kind == "cpu" else 1 / figures.peak
    return dict.fromkeys(("products", "merged", "linear"), flop)
