"""A rank that hangs (halted by SIGSTOP) keeps nobody waiting: not a job that is cancelled, not free, not stop.

The caller is back within the deadline and 10 s, the group is ended, the reason is in the log, the next job is right.
Two cases by default; all with --all-silences.
"""

import logging
import os
import signal
import threading
import time

import pytest
import torch
from ascend_runtime import DiffusionModelSpec, JobCancelled, LoraSpec, SampleSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.client import submission
from killed_client import SHAPE
from new_prompts import new_prompt
from rank_processes import seconds_until
from torch.testing import assert_close

DEADLINE, SLACK = 2.0, 10.0  # seconds
WORK = ("load", "encode", "sample", "decode", "encode video")
BEFORE = [(operation, "before") for operation in ("free", "stop", *WORK)]
DURING = [(operation, "during") for operation in WORK]
SAMPLE = [("free", "before"), ("sample", "during")]


def pytest_generate_tests(metafunc):
    if "when" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-silences")
        metafunc.parametrize("operation, when", BEFORE + DURING if everything else SAMPLE)


@pytest.fixture(scope="module")
def slow_checkpoint(checkpoints):
    """Deep enough that a rank can be halted within each kind of work."""
    return checkpoints(layers=24, text_layers=24)


@pytest.fixture(scope="module")
def ranks(new_runtime):
    with new_runtime(2) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(one_rank, slow_checkpoint):
    return latent_of(one_rank, slow_checkpoint)


@pytest.fixture
def short_deadline(monkeypatch):
    monkeypatch.setattr(submission, "CANCEL_DEADLINE", DEADLINE)


def latent_of(runtime, folder, steps=3, **hooks):
    spec = SampleSpec(seed=1, steps=steps, guidance_scale=1.0)
    text = torch.ones(1, 512, 32)
    return runtime.sample(DiffusionModelSpec(path=str(folder)), spec, torch.zeros(SHAPE), text, **hooks).tensor


def do(runtime, folder, operation, **hooks):
    path = str(folder)
    if operation == "load":
        runtime.free()
        runtime.load(DiffusionModelSpec(path=path), TextEncoderSpec(path=path), VaeSpec(path=path), **hooks)
    elif operation == "encode":
        runtime.encode(TextEncoderSpec(path=path), new_prompt(), **hooks)
    elif operation == "sample":
        latent_of(runtime, folder, steps=50, **hooks)
    elif operation == "decode":
        runtime.decode(VaeSpec(path=path), torch.zeros(1, 16, 20, 8, 8), **hooks)
    else:
        runtime.encode_video(VaeSpec(path=path), torch.zeros(41, 64, 64, 3), **hooks)


def test_a_halted_rank_keeps_nobody_waiting(ranks, slow_checkpoint, expected, short_deadline, caplog, operation, when):
    latent_of(ranks, slow_checkpoint)
    victim = ranks.pids[0]
    with caplog.at_level(logging.WARNING):
        took = halted(ranks, slow_checkpoint, operation, when, victim)
    assert took < DEADLINE + SLACK
    assert not ranks.alive
    if operation != "stop":
        assert "Rank 0" in caplog.text and "did not answer in time" in caplog.text
        assert "Rank 0 is stopped by a signal" in caplog.text
    seconds_until(lambda: not os.path.exists(f"/proc/{victim}"), 3.0)
    assert_close(latent_of(ranks, slow_checkpoint), expected, atol=1e-4, rtol=0.0)


def halted(runtime, folder, operation, when, victim) -> float:
    """Seconds from the moment in which the victim hangs, and somebody wants an end of it, until the caller is back."""
    if operation in ("free", "stop"):
        os.kill(victim, signal.SIGSTOP)
        began = time.monotonic()
        getattr(runtime, operation)()
        return time.monotonic() - began
    halted_at = []

    def halt(*_):
        if not halted_at:
            os.kill(victim, signal.SIGSTOP)
            halted_at.append(time.monotonic())
            runtime.cancel()

    if when == "during":
        hooks = {"on_progress": halt}
    else:
        if operation == "load":
            runtime.free()  # which must still be answered
        os.kill(victim, signal.SIGSTOP)
        halted_at.append(time.monotonic())
        hooks = {"should_cancel": lambda: time.monotonic() > halted_at[0] + 0.5}
    with pytest.raises(JobCancelled, match="Rank.* did not answer in time"):
        if operation == "load" and when == "before":
            runtime.load(DiffusionModelSpec(path=str(folder)), **hooks)
        else:
            do(runtime, folder, operation, **hooks)
    return time.monotonic() - halted_at[0]


def test_a_message_that_a_halted_rank_does_not_read_can_be_cancelled_and_stopped(ranks, specs, short_deadline):
    """3 MB are more than the connection holds: the rest waits here, where a cancel and a stop can still be heard."""
    loras = tuple(LoraSpec(path=f"/nowhere/{number}{'x' * 100}") for number in range(20_000))
    model = DiffusionModelSpec(path=specs.model.path, loras=loras)
    ranks.ping()
    os.kill(ranks.pids[0], signal.SIGSTOP)
    began = time.monotonic()
    stopper = threading.Timer(1.0, ranks.stop)
    stopper.start()
    with pytest.raises((JobCancelled, ValueError)):  # the other rank may say meanwhile that there are no such LoRAs
        ranks.load(model)
    stopper.join()
    assert time.monotonic() - began < 1 + DEADLINE + SLACK and not ranks.alive


def test_silence_is_noticed_with_what_each_rank_does(ranks, specs, monkeypatch, caplog):
    ranks.load(model=specs.model)  # imports networks, without a word
    ranks.free()
    monkeypatch.setattr(submission, "SILENCE", 0.5)
    ranks.ping()
    victim, notices = ranks.pids[1], []
    os.kill(victim, signal.SIGSTOP)

    def hear(text):
        notices.append(text)
        os.kill(victim, signal.SIGCONT)

    with caplog.at_level(logging.WARNING):
        ranks.load(model=specs.model, on_notice=hear)
    text, again = notices
    assert text.startswith("The ranks have not reported for 1 s") and "Rank 1 is stopped by a signal" in text
    assert "The ranks report again after" in again and text in caplog.text
