"""Messages that no honest side sends: nothing crashes, hangs, grows or leaks, on the side of the client and of a rank.

3,000 at a channel, 200 at a rank and 200 at a client; 20,000 at each with --all-messages.
"""

import gc
import os
import random
import socket
import threading
import time
from contextlib import suppress

import msgspec
import pytest
from ascend_runtime import RankDied, RankError
from ascend_runtime.wire import messages
from ascend_runtime.client.links import ChannelLink
from ascend_runtime.wire.messages import UNREAD, Done, Failed, Message, Ping, Progress, Undecodable
from ascend_runtime.client.submission import Hooks, Submission
from ascend_runtime.wire.channel import Channel, ChannelClosed, channel_pair
from hostile_messages import SHAPES, TO_CLIENT, TO_RANKS, Descriptors, encoded, framed, mutated, send
from rank_processes import resident_mb

GROWTH = 200  # MB
ANSWER = 30.0  # seconds
PATIENCE = 10.0  # seconds until what has ended is gone


@pytest.fixture
def count(request):
    return lambda few: 20_000 if request.config.getoption("--all-messages") else few


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_by_others():
    """Files of what tests of other modules have left to the garbage collector would hide those of a test here."""
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """This process has no descriptor more after the test, and little more memory."""
    before, memory = open_files(), resident_mb(os.getpid())
    yield
    assert_no_more(before)
    assert resident_mb(os.getpid()) - memory < GROWTH


def open_files(pid="self") -> list[str]:
    """What the descriptors of a process are of."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return sorted(found)


def assert_no_more(before, pid="self"):
    """Threads that read what ranks print may end later than the ranks; objects in circles go with the collector."""
    deadline = time.monotonic() + PATIENCE
    while len(now := open_files(pid)) > len(before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert len(now) <= len(before), f"{now}, before: {before}"


@pytest.mark.parametrize("written", SHAPES, ids=str)
def test_a_tensor_that_is_none_is_refused(written):
    body = msgspec.msgpack.encode({"type": "Done", "job": 1, "tensor": written})
    with pytest.raises(Undecodable):
        messages.decode(body, bytearray(64), [])


def test_a_descriptor_is_no_two_tensors_and_one_that_is_not_named_is_closed():
    shared = [0, "float32", [1]]
    body = {"type": "Decode", "job": 1, "vae": {"path": "/v"}, "latent": [0, "float32", [0]], "frames": shared}
    received = messages.decode(msgspec.msgpack.encode(body), None, [os.dup(0), os.dup(0)])
    assert received.frames.fd >= 0
    body["vae"] = {"path": 5}  # refused after the descriptor was taken
    with pytest.raises(Undecodable):
        messages.decode(msgspec.msgpack.encode({**body, "frames": shared}), None, [os.dup(0)])
    del received


@pytest.mark.timeout(1800)
def test_a_channel_takes_anything_and_goes_on_or_ends(rng, count):
    bodies = [encoded(message) for message in TO_RANKS + TO_CLIENT]
    outcomes = dict.fromkeys(("message", "undecodable", "closed", "waits"), 0)
    ours, theirs = channel_pair()
    with Descriptors() as files:
        for _ in range(count(3000)):
            body, block = rng.choice(bodies)
            descriptors = files.some(rng)
            announced = len(descriptors) if rng.random() < 0.8 else rng.randrange(9)
            lie = rng.random() < 0.1
            send(theirs, framed(mutated(body, rng), block, announced, rng, lie), descriptors)
            outcome = taken(ours)
            outcomes[outcome] += 1
            if outcome in ("closed", "waits"):
                ours.close()
                theirs.close()
                ours, theirs = channel_pair()
    ours.close()
    theirs.close()
    print(outcomes)
    assert all(outcomes.values()), f"not every outcome was seen: {outcomes}"


def taken(channel: Channel) -> str:
    try:
        return "waits" if channel.take() is None else "message"
    except Undecodable:
        return "undecodable"
    except ChannelClosed:
        return "closed"


@pytest.mark.timeout(3600)
def test_a_rank_answers_whatever_it_is_sent(rng, count, new_runtime):
    bodies = [encoded(message) for message in TO_RANKS]
    with new_runtime(1) as runtime, Descriptors() as files:
        runtime.ping()
        (rank,) = runtime._group.ranks
        before, memory = open_files(rank.process.pid), resident_mb(rank.process.pid)
        raw = socket.socket(fileno=os.dup(rank.channel.fileno()))
        for _ in range(count(200)):
            body, block = rng.choice(bodies)
            descriptors = files.some(rng)
            announced = min(len(descriptors), 8)
            send(raw, framed(mutated(body, rng), block, announced, rng, lie=False), descriptors)
            rank.channel.send(Ping(job=7))
            answers = [rank.channel.receive(timeout=ANSWER)]
            while not (isinstance(answers[-1], Done) and answers[-1].job == 7):
                answers.append(rank.channel.receive(timeout=ANSWER))
            answers = [answer for answer in answers if not isinstance(answer, Progress)]
            assert len(answers) <= 2 and all(isinstance(answer, (Failed, Done)) for answer in answers)
        raw.close()
        assert_no_more(before, rank.process.pid)
        assert resident_mb(rank.process.pid) - memory < GROWTH


def test_a_rank_says_that_it_cannot_read_a_message(one_rank):
    one_rank.ping()
    (rank,) = one_rank._group.ranks
    raw = socket.socket(fileno=os.dup(rank.channel.fileno()))
    send(raw, framed(b"\xc1", 0, 0, random, lie=False), [])
    raw.close()
    answer = rank.channel.receive(timeout=ANSWER)
    assert isinstance(answer, Failed) and answer.job == UNREAD and "cannot be decoded" in answer.error
    rank.channel.send(Progress(job=1, stage="load", step=1, total=2))
    answer = rank.channel.receive(timeout=ANSWER)
    assert isinstance(answer, Failed) and "Progress is not a job" in answer.error
    one_rank.ping()


class StandInGroup:
    """A group of one rank whose answers a test writes."""

    lost = False

    def __init__(self, channel):
        self.links = [ChannelLink(0, channel)]

    def died(self, doing):
        return RankDied(doing)


@pytest.mark.timeout(3600)
def test_a_client_is_back_whatever_a_rank_answers(rng, count):
    bodies = [encoded(message) for message in TO_CLIENT]
    seen = set()
    with Descriptors() as files:
        for _ in range(count(200)):
            ours, theirs = channel_pair()
            body, block = rng.choice(bodies)
            descriptors, lie = files.some(rng), rng.random() < 0.2
            data = framed(mutated(body, rng), block, min(len(descriptors), 8), rng, lie)
            send(theirs, data, descriptors)
            theirs.shutdown(socket.SHUT_WR)
            seen.add(outcome_of(StandInGroup(ours)))
            ours.close()
            theirs.close()
    assert {"RankDied", "RankError"} <= seen, seen


def outcome_of(group: StandInGroup) -> str:
    began = time.monotonic()
    try:
        Submission(Ping(job=1), group, threading.Event(), Hooks()).run()
        return "a result"
    except (RankDied, RankError, ValueError) as error:
        return type(error).__name__
    finally:
        assert time.monotonic() - began < 10


def test_what_cannot_be_sent_is_refused_before_a_rank_is_at_work(one_rank):
    one_rank.ping()
    before = one_rank.pids
    for wrong in ({"info": {"thing": object()}}, {"info": {"text": "\ud83d"}}, {"info": {"number": 2**70}}):
        message: Message = Done(job=1, **wrong)
        submission = Submission(message, one_rank._group, threading.Event(), Hooks())
        with pytest.raises(ValueError, match="cannot be sent|half a character"):
            submission.run()
        assert not submission.unanswered
    one_rank.ping()
    assert one_rank.pids == before
