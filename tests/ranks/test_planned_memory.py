"""What the planner predicts that a job holds is what ranks take, and at most 15 % more, besides what they take in some
runs only."""

from functools import partial

import memory_jobs
import pytest
from benchmarks.memory import GIVES_BACK
from memory_jobs import MB, REST, SAMPLE, Job

MOST = 1.15  # of what is taken
MOST_SURE = 1.1  # of what is taken, without what may be taken by chance
LEAST_JOB = 300 * MB
SMALL = (1, 16, 2, 8, 8)  # a latent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return memory_jobs.Models(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def thrifty(new_runtime):
    """`thrifty(n)`: n ranks whose malloc gives back what is freed; one group at a time."""
    started = {}

    def group(ranks: int):
        if ranks not in started:
            stop()
            started[ranks] = new_runtime(ranks, **GIVES_BACK)
        return started[ranks]

    def stop():
        while started:
            started.popitem()[1].stop()

    yield group
    stop()


def check(runtime, job: Job, models) -> None:
    """Prints each rank's figures, and compares them."""
    memory_jobs.run(runtime, job, models, SMALL)  # imports what it needs, and makes groups of ranks
    runtime.free()
    taken = memory_jobs.taken(runtime, partial(memory_jobs.run, runtime, job, models))
    runtime.free()
    faults, chance = [], memory_jobs.by_chance(job, models)
    most = MOST_SURE if chance else MOST
    for rank, own in enumerate(taken):
        parts = memory_jobs.predicted(job, models, rank)
        said = sum(parts.values())
        listed = ", ".join(f"{name} {size / MB:.0f}" for name, size in parts.items() if size >= MB)
        figures = f"{said / MB:.0f} MB predicted, {own / MB:.0f} taken, {said / own:.3f}, {chance / MB:.0f} by chance"
        line = f"{job.name}, rank {rank}: {figures} ({listed})"
        print(line)
        if not (own >= LEAST_JOB and own <= said <= most * own + chance):
            faults.append(line)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("job", SAMPLE, ids=lambda job: job.name)
def test_what_is_predicted_is_what_ranks_take(thrifty, models, job):
    check(thrifty(job.ranks), job, models)


@pytest.mark.parametrize("job", REST, ids=lambda job: job.name)
def test_what_is_predicted_is_what_ranks_take_in_all_jobs(thrifty, models, job, request):
    if not request.config.getoption("--all-memory"):
        pytest.skip("--all-memory")
    check(thrifty(job.ranks), job, models)
