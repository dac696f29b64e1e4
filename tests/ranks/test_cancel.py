"""A job ends within a step of the wish to cancel, and leaves ranks that go on as if it had not been."""

import math
import select
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from ascend_runtime import JobCancelled, ParallelSpec, SampleSpec
from exchanges import EXCHANGES, some
from killed_client import SHAPE
from new_prompts import new_prompt
from torch.testing import assert_close

PATIENCE = 0.1  # seconds beyond a step; asked for with --all-cancels alone, which wants a quiet machine
STEPS_AFTER = 2  # may still be reported: one that was done when the wish came, and one that had begun
SPEC = SampleSpec(seed=1, steps=8, guidance_scale=3.0)
SHORT = SampleSpec(seed=1, steps=1, guidance_scale=3.0)


@pytest.fixture(scope="module")
def specs(checkpoints, specs_of):
    return specs_of(checkpoints(layers=24, text_layers=24))


def sample(runtime, specs, spec=SPEC, **hooks):
    return runtime.sample(specs.model, spec, torch.zeros(SHAPE), specs.text(1), specs.text(2), **hooks).tensor


@pytest.fixture(scope="module")
def expected(two_ranks, specs):
    """The short job, never cancelled."""
    latent = sample(two_ranks, specs, SHORT)
    assert latent.std() > 0.1
    return latent


@pytest.fixture
def survivors(two_ranks, specs, expected):
    """Two ranks; after the test they are the same processes, and the next job equals one never cancelled."""
    pids = two_ranks.pids
    yield two_ranks
    assert_close(sample(two_ranks, specs, SHORT), expected, atol=1e-6, rtol=0.0)
    assert two_ranks.pids == pids


class Stopwatch:
    """Notes when the steps of jobs are reported, and how long they take, from an `on_progress`."""

    def __init__(self):
        self.steps = []
        self.reported = []

    def __call__(self, stage, step, total):
        now = time.monotonic()
        if step > 1 and self.reported:
            self.steps.append(now - self.reported[-1])
        self.reported.append(now)


class Wish:
    """A `should_cancel` that cancels from a moment on, so many seconds after it was made, as soon as the client has
    taken all reports: a client that waits for a core takes reports of many steps later than the ranks made them.

    at: when it cancelled; None: it has not. reported: the reports until then.
    """

    def __init__(self, runtime, watch, moment):
        self._runtime, self._watch, self._from = runtime, watch, time.monotonic() + moment
        self.at, self.reported = None, 0

    def __call__(self):
        if self.at is None and time.monotonic() >= self._from and not self._waiting():
            self.at, self.reported = time.monotonic(), len(self._watch.reported)
            self._runtime.cancel()
        return self.at is not None

    def _waiting(self):
        return select.select([rank.channel for rank in self._runtime._group.ranks], [], [], 0)[0]


def cancelled_after(job, moment, cancel):
    """Seconds from a cancel, `moment` seconds after the job's begin, to the job's end; None if the job was faster."""
    cancelled_at = []

    def fire():
        cancelled_at.append(time.monotonic())
        cancel()

    timer = threading.Timer(moment, fire)
    timer.start()
    try:
        job()
    except JobCancelled:
        return time.monotonic() - cancelled_at[0]
    finally:
        timer.cancel()
        timer.join()
    return None


def test_cancels_at_random_moments(request, survivors, specs, expected, rng):
    everything = request.config.getoption("--all-cancels")
    jobs = sampling_jobs(survivors, specs)
    assert_cancels(survivors, *jobs, rng, wanted=50 if everything else 10, timed=everything)


@pytest.mark.timeout(1800)  # with --all-cancels
def test_cancels_within_exchanges(request, two_ranks, new_runtime, specs, rng):
    """By plans with every kind of exchange: no rank is left in one, nor with what it received from half of one."""
    everything = request.config.getoption("--all-cancels")
    for name, plan in (EXCHANGES if everything else some(rng, 1)).items():
        print(name)
        with nullcontext(two_ranks) if plan["ranks"] == 2 else new_runtime(plan["ranks"]) as runtime:
            long, short = sampling_jobs(runtime, specs, ParallelSpec(**plan))
            assert_cancels(runtime, long, short, rng, wanted=10 if everything else 3, timed=everything)


@pytest.mark.timeout(1800)  # with --all-cancels
def test_cancels_between_frames(request, two_ranks, new_runtime, specs, rng):
    """Of tiles that exchange borders: what a rank has kept of one video's frames is gone with it."""
    everything = request.config.getoption("--all-cancels")
    for ranks in (2, 3) if everything else (2,):
        with nullcontext(two_ranks) if ranks == 2 else new_runtime(ranks) as runtime:
            for long, short in video_jobs(runtime, specs):
                assert_cancels(runtime, long, short, rng, wanted=10 if everything else 2, timed=everything)


def sampling_jobs(runtime, specs, parallel=None):
    """Sampling in eight steps, as `job(**hooks)`, and in one."""
    return tuple(partial(sample, runtime, specs, spec, parallel=parallel) for spec in (SPEC, SHORT))


def video_jobs(runtime, specs):
    """Decoding and encoding, each of ten latent frames and of two."""
    latent = torch.randn(1, 16, 10, 8, 8, generator=torch.Generator().manual_seed(1))
    video = torch.rand(37, 64, 64, 3, generator=torch.Generator().manual_seed(1))

    def job(work, *given):
        return lambda **hooks: work(specs.vae, *given, **hooks).tensor

    yield job(runtime.decode, latent), job(runtime.decode, latent[:, :, :2])
    yield job(runtime.encode_video, video), job(runtime.encode_video, video[:5])


def assert_cancels(runtime, long, short, rng, wanted, timed):
    """Each within a step, and the next job equals one that follows no cancel, on the same processes."""
    watch, delays = Stopwatch(), []
    expected, pids = short(), runtime.pids
    whole = None  # seconds of a job that ended: the last one, as the machine may be less busy by now
    for _ in range(3 * wanted):
        wish, began = Wish(runtime, watch, math.inf if whole is None else rng.uniform(0, whole)), time.monotonic()
        try:
            long(on_progress=watch, should_cancel=wish)
            whole = time.monotonic() - began
        except JobCancelled:
            delays.append(time.monotonic() - wish.at)
            assert len(watch.reported) - wish.reported <= STEPS_AFTER
        assert_close(short(), expected, atol=1e-6, rtol=0.0)
        assert runtime.pids == pids
        if len(delays) == wanted:
            break
    assert len(delays) == wanted
    print(f"slowest step {max(watch.steps):.3f} s, slowest cancel {max(delays):.3f} s")
    assert not timed or max(delays) <= max(watch.steps) + PATIENCE


@pytest.mark.parametrize("stage", ["load", "encode", "denoise", "decode", "encode video"])
def test_cancel_in_every_stage(survivors, specs, stage):
    """From a callback of that stage, at its first step; the last one is never reached."""
    reported = []

    def on_progress(at, step, total):
        reported.append((at, step, total))
        if at == stage.split()[0]:
            survivors.cancel()

    if stage == "load":
        survivors.free()
    jobs = {
        "load": lambda: survivors.load(specs.model, on_progress=on_progress),
        "encode": lambda: survivors.encode(specs.encoder, new_prompt(), on_progress=on_progress),
        "denoise": lambda: sample(survivors, specs, on_progress=on_progress),
        "decode": lambda: survivors.decode(specs.vae, torch.zeros(1, 16, 21, 8, 8), on_progress=on_progress),
        "encode video": lambda: survivors.encode_video(specs.vae, torch.zeros(81, 64, 64, 3), on_progress=on_progress),
    }
    pytest.raises(JobCancelled, jobs[stage])
    steps = [step for at, step, total in reported if at == stage.split()[0]]
    assert steps and max(steps) < reported[-1][2]


@pytest.mark.parametrize("plan", [{}, {"tp_degree": 2}, {"fsdp": True}], ids=["whole", "slices", "shares"])
def test_a_cancelled_load_is_begun_anew(survivors, specs, expected, plan):
    plan = ParallelSpec(ranks=2, **plan)
    survivors.free()
    pytest.raises(JobCancelled, survivors.load, specs.model, parallel=plan, on_progress=lambda *_: survivors.cancel())
    reported = []
    survivors.load(specs.model, parallel=plan, on_progress=lambda *news: reported.append(news))
    assert reported and reported[-1][1] == reported[-1][2]
    assert_close(sample(survivors, specs, SHORT, parallel=plan), expected, atol=1e-4, rtol=0.0)


def test_should_cancel_is_asked(survivors, specs):
    steps = []
    with pytest.raises(JobCancelled):
        sample(survivors, specs, on_progress=lambda *news: steps.append(news), should_cancel=lambda: len(steps) > 1)
    assert len(steps) < SPEC.steps


def test_cancel_without_a_job_does_nothing(survivors, specs, expected):
    survivors.cancel()
    assert_close(sample(survivors, specs, SHORT), expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("hook", ["on_progress", "on_preview", "should_cancel"])
def test_an_exception_in_a_callback_ends_the_job_and_nothing_else(survivors, specs, hook):
    class Interrupted(Exception):
        pass

    calls = []

    def callback(*_):
        calls.append(time.monotonic())
        raise Interrupted("by the user")

    with pytest.raises(Interrupted, match="by the user"):
        sample(survivors, specs, **{hook: callback})
    assert calls


@pytest.mark.parametrize("job", [
    lambda runtime, specs: sample(runtime, specs),
    lambda runtime, specs: runtime.decode(specs.vae, torch.zeros(SHAPE)),  # which asks about the VAE before it decodes
], ids=["sample", "decode"])  # fmt: skip
def test_a_cancel_while_the_ranks_start(new_runtime, specs, expected, job):
    with new_runtime(2) as runtime:
        assert cancelled_after(lambda: job(runtime, specs), 0.3, runtime.cancel) is not None
        assert_close(sample(runtime, specs, SHORT), expected, atol=1e-6, rtol=0.0)
