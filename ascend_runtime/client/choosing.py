"""Which plans jobs take: the ranks choose one for each kind of job, and the client keeps it, so that a job like an
earlier one asks nothing. After a rank ran out of memory, a job gets one more try, with a plan that takes less."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from ..hardware import host
from ..specs import DiffusionModelSpec
from ..specs.record import MAX_LINE
from ..wire.messages import Choose
from ..wire.plans import Chosen, PlannedJob
from .group import RankDied
from .jobs import JobsOfCall
from .submission import RankError, Result

logger = logging.getLogger(__name__)

CLEARLY_LESS = 0.9  # of what failed: a plan that takes hardly less fails like it, and there is only one more try
MOST_KEPT = 64  # choices
WeightsKey = tuple  # what identifies how the weights of a model lie on the ranks


class Choices:
    """The plans that were chosen since the ranks started."""

    def __init__(self):
        self._kept: OrderedDict[tuple, Chosen] = OrderedDict()
        self._weights: WeightsKey | None = None  # of the last model that ranks loaded

    def forget(self) -> None:
        """The ranks hold no weights, or their memory is another one."""
        self._kept.clear()
        self._weights = None

    def of(self, jobs: JobsOfCall, planned: PlannedJob) -> Chosen:
        """The plan for a job. Ranks that cannot shard weights start again if the plan needs it.

        Raises ValueError, with the numbers and the nearest size that fits, if no plan fits.
        """
        planned = _kind(planned)
        chosen = self._kept.get((planned, self._weights)) or asked(jobs, planned)
        self._keep(planned, chosen)
        jobs.begin(bool(chosen.parallel.fsdp))
        self._weights = _weights(planned.model, chosen)
        self._keep(planned, chosen)  # for the next job, which finds these weights
        return chosen

    def smaller(self, jobs: JobsOfCall, planned: PlannedJob, failed: Chosen, on_host: bool) -> Chosen | None:
        """The fastest plan that is predicted to take clearly less than the one that failed; None: there is none.
        on_host: of the host's memory, else of a device's."""
        taken, which = (failed.host, "below_host") if on_host else (failed.device, "below")
        if not taken:  # the failed plan had no prediction
            return None
        chosen = asked(jobs, _kind(planned), **{which: int(CLEARLY_LESS * taken)})
        if chosen is not None:
            jobs.begin(bool(chosen.parallel.fsdp))
            self._weights = _weights(planned.model, chosen)
            self._keep(_kind(planned), chosen)
        return chosen

    def _keep(self, planned: PlannedJob, chosen: Chosen) -> None:
        self._kept[planned, self._weights] = chosen
        self._kept.move_to_end((planned, self._weights))
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)


def _kind(planned: PlannedJob) -> PlannedJob:
    """The job without what no plan depends on."""
    loras = tuple(replace(one, strength=1.0) for one in planned.model.loras)
    return replace(planned, sample=replace(planned.sample, seed=0), model=replace(planned.model, loras=loras))


def _weights(model: DiffusionModelSpec, chosen: Chosen) -> WeightsKey:
    return replace(chosen.arranged(model), loras=()), chosen.parallel.tp_degree, chosen.parallel.fsdp


def asked(jobs: JobsOfCall, planned: PlannedJob, below: int = 0, below_host: int = 0) -> Chosen | None:
    """What the ranks choose for a job; see `wire.messages.Choose`."""
    found = jobs(lambda job: Choose(job=job, planned=planned, below=below, below_host=below_host)).info["plan"]
    return found and msgspec.convert(found, Chosen)


def with_plan(jobs: JobsOfCall, choices: Choices, planned: PlannedJob, run: Callable[[Chosen], Result]) -> Result:
    """The result of a job with the plan that is chosen for it: `info["plan"]` has the plan, next to what it took.

    If a rank runs out of memory, the job runs once more with the next plan that takes less, if the user has left one
    open; the result's warnings say so.
    """
    chosen = choices.of(jobs, planned)
    jobs.show(chosen)
    try:
        return _with_plan(run(chosen), chosen, chosen.warnings)
    except (RankError, RankDied) as caught:
        error = caught
        smaller = _next(jobs, choices, planned, chosen, error)
        if smaller is None:
            raise
    warning = _retried(chosen, smaller, _of_host(jobs, error))
    jobs.notice(warning)
    jobs.show(smaller)
    return _with_plan(run(smaller), smaller, [warning, *smaller.warnings])


def _next(
    jobs: JobsOfCall, choices: Choices, planned: PlannedJob, failed: Chosen, error: RankError | RankDied
) -> Chosen | None:
    """The plan to try after an error; None: the error is another one, or no plan is left."""
    if not host.out_of_memory(str(error)):
        return None
    jobs.begin()
    jobs.free()  # what the failed plan has left
    choices.forget()
    try:
        return choices.smaller(jobs, planned, failed, on_host=_of_host(jobs, error))
    except ValueError as refusal:
        logger.info("No other plan is tried: %s", refusal)
        return None


def _of_host(jobs: JobsOfCall, error: RankError | RankDied) -> bool:
    """Whether the host's memory did not suffice, rather than a device's. Ranks on a CPU take all of theirs from it."""
    return jobs.on_devices and not host.out_of_device_memory(str(error))


def _retried(failed: Chosen, smaller: Chosen, on_host: bool) -> str:
    what, taken, free, less = "A rank", failed.device, failed.device_free, smaller.device
    if on_host:
        what, taken, free, less = "The host", failed.host, failed.host_free, smaller.host
    return (
        f"{what} ran out of memory, though {taken / 1e9:.1f} GB were predicted and {free / 1e9:.1f} GB free. The job "
        f"runs once more with a plan that takes less, {less / 1e9:.1f} GB: {smaller.line}"
    )


def _with_plan(result: Result, chosen: Chosen, warnings: Sequence[str] = ()) -> Result:
    """The result with its plan in `info["plan"]`."""
    took = {stage: seconds for stage, seconds in result.seconds.items() if stage in chosen.seconds}
    plan = {"line": chosen.line, "predicted": dict(chosen.seconds), "took": took, "device": chosen.device,
            "host": chosen.host, "device_free": chosen.device_free}  # fmt: skip
    result.info["plan"] = plan
    if warnings:
        result.info["warnings"] = [*result.info.get("warnings", ()), *warnings]
    if result.record is None or not chosen.seconds:  # without a prediction, the line is about files
        return result
    return dataclasses.replace(result, record=replace(result.record, predicted=chosen.line[:MAX_LINE]))
