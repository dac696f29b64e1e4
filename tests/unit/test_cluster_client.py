"""A client and the machines of a cluster, played by threads (played_machines.py): joining, jobs, results, losses.

Real ranks are in tests/ranks/test_cluster_clients.py, on one host, and in tests/machines/, on several.
"""

import errno
import gc
import logging
import math
import os
import re
import socket
import threading
import time

import msgspec
import pytest
import torch
from ascend_runtime import (
    Cluster,
    DiffusionModelSpec,
    JobCancelled,
    ParallelSpec,
    RankDied,
    RankError,
    Runtime,
    SampleSpec,
)
from ascend_runtime.client.machines import group as cluster_group
from ascend_runtime.client.machines import listener
from ascend_runtime.client.machines import machine as machine_module
from ascend_runtime.client.rank_words import ranks_in_words
from ascend_runtime.hardware import host
from ascend_runtime.wire.envelopes import Deliver, FromRank, Leave, Region, Rejected
from ascend_runtime.wire.messages import Done, Failed
from ascend_runtime.wire.plans import Chosen
from ascend_runtime.wire.tls import make_key
from played_machines import PlayedMachine, free_port, until

FRAMES = (6, 20, 30, 3)


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "played.key"
    make_key(path, "played")
    return path


@pytest.fixture
def cluster(key):
    return Cluster(name="played", listen=f"127.0.0.1:{free_port()}", key=str(key), ranks=3)


@pytest.fixture
def machines(cluster):
    """`machines(first, second)`: two played machines with the ranks 0, 1 and 2; what they are given besides."""
    started = []

    def start(first=None, second=None):
        for name, ranks, given in (("atlas1", (0, 1), first), ("atlas2", (2,), second)):
            started.append(PlayedMachine(cluster, name, ranks, **(given or {})).__enter__())
        return started[-2:]

    yield start
    for machine in started:
        machine.vanish()


@pytest.fixture
def runtime(cluster):
    with Runtime(cluster=cluster) as runtime:
        yield runtime


def in_background(call):
    """Starts a call in a thread; a function that waits for it, and returns what it returned or raised."""
    outcome = []

    def run():
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(seconds=20):
        thread.join(seconds)
        assert outcome, "the call has not returned"
        return outcome[0]

    return result


# Joining


def test_ranks_join_and_a_message_goes_once_to_each_machine(runtime, machines):
    assert runtime.device == "auto" and runtime.world_size == 3 and runtime.machines == [] and not runtime.alive
    first, second = machines()
    sent = torch.arange(1000.0)
    runtime.ping(sent)
    assert runtime.alive and runtime.machines == ["atlas1", "atlas2"] and runtime.device == "cpu"
    assert runtime.pids == []
    for machine, ranks in ((first, (0, 1)), (second, (2,))):
        (deliver,) = machine.seen_of(Deliver)
        assert deliver.ranks == ranks and deliver.job == 1 and deliver.block == 4000 + -4000 % 64
        assert torch.equal(torch.frombuffer(machine.block, dtype=torch.float32, count=1000), sent)


def test_rank_0_replies_with_tensors(runtime, machines):
    made = torch.randn(3, 5)
    machines({"answer": lambda machine, deliver, message: machine.done(deliver, tensor=made)})
    assert torch.equal(runtime.ping().tensor, made)


def test_a_job_that_waits_says_how_many_ranks_have_joined(runtime, cluster, monkeypatch, caplog):
    monkeypatch.setattr(cluster_group, "FIRST_NOTICE", 0.0)
    said = []
    with caplog.at_level(logging.INFO):
        result = in_background(lambda: runtime.load(on_notice=said.append))
        with PlayedMachine(cluster, "atlas1", (0, 1)):
            until(lambda: any("atlas1" in text for text in said))
            with PlayedMachine(cluster, "atlas2", (2,)):
                assert not isinstance(result(), Exception)
    none, two = said[0], next(text for text in said if text.startswith("2 of"))
    assert none == ("0 of 3 ranks have joined; waiting for the machines of the cluster 'played' at "
                    f"{cluster.listen}.")  # fmt: skip
    assert two == "2 of 3 ranks have joined; waiting for rank 2. Joined: atlas1 (ranks 0, 1)."
    assert all(text in caplog.text for text in (none, two))


def test_ranks_that_do_not_join_in_time(runtime, cluster, machines, monkeypatch):
    monkeypatch.setenv("ASCEND_RUNTIME_START_DEADLINE", "0.4")
    with PlayedMachine(cluster, "atlas1", (0, 1)), pytest.raises(TimeoutError) as caught:
        runtime.ping()
    text = str(caught.value)
    assert text.startswith("AV-1905: Only 2 of the 3 ranks of the cluster 'played' have joined within 0 s; missing: ")
    assert "missing: rank 2. Joined: atlas1 " in text
    assert "`python -m ascend_runtime cluster show played` prints the commands" in text and cluster.key not in text
    monkeypatch.delenv("ASCEND_RUNTIME_START_DEADLINE")
    machines()
    runtime.ping()  # the client has listened on


def test_ranks_of_different_groups_are_not_one(runtime, machines, monkeypatch):
    monkeypatch.setenv("ASCEND_RUNTIME_START_DEADLINE", "0.3")
    machines({"group": "before"}, {"group": "after"})
    with pytest.raises(TimeoutError, match="AV-1905: The ranks of the cluster 'played' have not found each other"):
        runtime.ping()


@pytest.mark.parametrize("given, reason", [
    ({"pack": "0.0.1"}, "AV-1903: The machine 'atlas2' has Ascend Video '0.0.1', and the client"),
    ({"protocol": 0}, "AV-1903: The machine 'atlas2' speaks version 0 of the protocol"),
    ({"packages": {"torch": "1.0"}}, r"AV-1903: The machine 'atlas2' has another \w+ \(.*\) than 'atlas1'"),
    ({"world_size": 8}, "AV-1904: The ranks of the machine 'atlas2' were started as part of 8, .* \"ranks\": 3"),
    ({"ranks": (2, 3)}, "AV-1904: The machine 'atlas2' reports the ranks \\(2, 3\\); they must be"),
    ({"ranks": ()}, "AV-1904: The machine 'atlas2' reports the ranks \\(\\); they must be"),
    ({"ranks": (1, 2)}, "AV-1904: The machine 'atlas2' has rank 1, as 'atlas1' does"),
    ({"machine": "atlas1"}, "AV-1904: A machine 'atlas1' is connected already, with ranks 0, 1"),
    ({"machine": "../x"}, "AV-1904: --machine is '../x'"),
    ({"device": "npu"}, "AV-1904: The machine 'atlas2' has the device 'npu', and 'atlas1' has 'cpu'"),
    ({"device": "tpu"}, "AV-1904: The device of the machine 'atlas2' is 'tpu', which is not known"),
])  # fmt: skip
def test_a_machine_that_does_not_fit_is_refused_by_name(runtime, cluster, monkeypatch, given, reason):
    monkeypatch.setattr(cluster_group, "FIRST_NOTICE", 0.0)
    said = []
    result = in_background(lambda: runtime.load(on_notice=said.append))
    with PlayedMachine(cluster, "atlas1", (0, 1)) as first:
        first.until(lambda one: one.welcomes)
        ranks = given.pop("ranks", (2,))
        with PlayedMachine(cluster, "atlas2", ranks, comes_again=False, **given) as second:
            second.until(lambda one: one.seen_of(Rejected))
            (rejected,) = second.seen_of(Rejected)
            until(lambda: said and rejected.reason in said[-1])
            runtime.cancel()
            assert isinstance(result(), JobCancelled)
    assert re.match(reason, rejected.reason)
    passing = "connected already" in rejected.reason or "as 'atlas1' does" in rejected.reason
    assert rejected.lasting is not passing


def test_what_a_runtime_with_a_cluster_can_be_given(cluster, machines):
    with pytest.raises(ValueError, match="AV-1904: ranks is 2, but the cluster 'played' has 3"):
        Runtime(ParallelSpec(ranks=2), cluster=cluster)
    with pytest.raises(ValueError, match="environment is for ranks that this host starts"):
        Runtime(cluster=cluster, environment={})
    with pytest.raises(ValueError, match="device is 'tpu'"):
        Runtime(cluster=cluster, device="tpu")
    with pytest.raises(ValueError, match="cluster is 'played'; it must be a Cluster or None"):
        Runtime(cluster="played")
    machines()
    with Runtime(ParallelSpec(ranks=3), "npu", cluster=cluster) as runtime:
        with pytest.raises(ValueError, match="AV-1904: device is 'npu', but the machines of the cluster .* have 'cpu'"):
            runtime.ping()


def test_an_address_that_cannot_be_listened_at(cluster, machines, runtime):
    machines()
    runtime.ping()
    with Runtime(cluster=cluster) as other:
        with pytest.raises(ValueError, match="AV-1908: .*Another program listens there, or another Runtime"):
            other.ping()
    elsewhere = Cluster(name="played", listen="192.0.2.1:29600", key=cluster.key, ranks=1)
    with Runtime(cluster=elsewhere) as other, pytest.raises(ValueError, match="AV-1908: .*not an address of this host"):
        other.ping()
    runtime.ping()


# Results


def parts(rng, shape):
    """Random parts that cover a tensor of this shape, each once."""
    sides = []
    for size in shape:
        cuts = sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(3)))})
        sides.append(list(zip(cuts, cuts[1:])))
    whole = [()]
    for side in sides:
        whole = [(*before, one) for before in whole for one in side]
    return [([start for start, _ in part], [stop - start for start, stop in part]) for part in whole]


@pytest.mark.parametrize("shape", [(5, 8, 9, 3), (2, 96, 100, 3), (3, 40, 2000, 3), (7, 1, 1, 3)])
def test_parts_of_a_result_arrive_where_they_belong(runtime, machines, rng, shape):
    """Long rows are received in place, short ones through a buffer."""
    whole = torch.randn(shape)
    shares = parts(rng, shape)
    rng.shuffle(shares)

    def write(machine, deliver, message):
        own = shares[::2] if machine.name == "atlas1" else shares[1::2]
        for starts, sizes in own:
            machine.write(deliver.job, whole, starts, sizes)
        machine.done(deliver)

    first, _ = machines({"answer": write}, {"answer": write})
    assert torch.equal(runtime.ping(frames=shape).tensor, whole)
    (deliver,) = first.seen_of(Deliver)
    assert deliver.lent == (whole.nbytes,)


@pytest.mark.parametrize("lie", [
    {"lent": 1}, {"lent": -1}, {"job": 9}, {"starts": (0, 0, 0, 1)}, {"starts": (-1, 0, 0, 0)}, {"starts": (0, 0, 0)},
    {"starts": (2**62, 0, 0, 0)}, {"itemsize": 3}, {"shape": (60, 2, 30, 3)}, {"shape": (6, 20, 30)},
    {"sizes": (7, 20, 30, 3)}, {"sizes": (1, 20, 30)},
])  # fmt: skip
def test_a_part_that_cannot_be_ends_the_group(runtime, machines, lie):
    def write(machine, deliver, message):
        region = {"job": deliver.job, "lent": 0, "shape": FRAMES, "starts": (0,) * 4, "sizes": (1, 20, 30, 3),
                  "itemsize": 4} | lie  # fmt: skip
        machine.link.post(Region(**region), bytes(math.prod(region["sizes"]) * region["itemsize"]))

    first, second = machines(None, {"answer": write})
    with pytest.raises(RankError, match="AV-1507: The machine atlas2 sent invalid data"):
        runtime.ping(frames=FRAMES)
    first.until(lambda one: one.seen_of(Leave))
    assert not runtime.alive


@pytest.mark.parametrize("says, expected", [
    (lambda machine, job: machine.say(1, Done(job=job)), "has no rank 1"),  # a rank of the other machine
    (lambda machine, job: machine.say(2, Done(job=job + 1)), "not an answer to this job"),
    (lambda machine, job: machine.link.post(Deliver(ranks=(2,), body=1), b"x"), "Deliver is not expected"),
    (lambda machine, job: machine.link.post(Leave(reason="x")), "Leave is not expected"),
    (lambda machine, job: machine.link.post(FromRank(rank=2, body=2), b"\xc1\xc1"), "Rank 2 sent an invalid answer"),
    (lambda machine, job: machine.link.post(FromRank(rank=2, body=3, block=9), b"abc", bytes(9)), "No message has 3"),
    (lambda machine, job: machine.link._socket.send(b"GET / HTTP/1.1\r\n"), "an invalid header"),
])  # fmt: skip
def test_what_a_machine_must_not_send(runtime, machines, monkeypatch, says, expected):
    monkeypatch.setattr(machine_module, "MOST_TENSORS", 8)
    machines(None, {"answer": lambda machine, deliver, message: says(machine, deliver.job)})
    with pytest.raises(RankError, match=f"AV-1507: .*{expected}"):
        runtime.ping()


def beyond_memory(machine):
    machine.link.post(FromRank(rank=2, body=1, block=9), b"a", bytes(9))


@pytest.mark.parametrize("says", [beyond_memory, lambda machine: machine.link._socket.send(b"GET / HTTP/1.1\r\n")])
def test_a_machine_that_breaks_the_rules_between_jobs_can_come_again(runtime, machines, monkeypatch, says):
    class Unmappable:
        @staticmethod
        def mmap(*_):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    first, second = machines()
    runtime.ping()
    with monkeypatch.context() as patched:
        patched.setattr(machine_module, "mmap", Unmappable)
        second.restarts = 1  # as the first machine's, once it has been asked to leave
        says(second)
        until(lambda: not runtime.alive)
    runtime.ping()


def test_an_answer_too_many_is_no_answer(runtime, machines):
    def twice(machine, deliver, message):
        machine.say(0, Done(job=deliver.job))
        machine.say(0, Done(job=deliver.job))

    machines({"answer": twice})
    with pytest.raises(RankError, match="AV-1507: Rank 0 sent Done, which is not an answer"):
        runtime.ping()


# Jobs


def test_a_failed_job_keeps_the_ranks(runtime, machines):
    def fail(machine, deliver, message):
        for rank in deliver.ranks:
            machine.say(rank, Failed(job=deliver.job, kind="user", error="this cannot be"))

    first, second = machines(*({"answer": fail},) * 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="this cannot be"):
            runtime.ping()
    assert runtime.alive and first.welcomes == second.welcomes == 1


def test_a_cancel_goes_to_ranks_that_have_not_answered(runtime, machines):
    cancelled = []

    def wait(machine, deliver, message):
        cancelled.append(deliver.job)

    first, second = machines(None, {"answer": wait})
    result = in_background(runtime.ping)
    second.until(lambda one: cancelled)
    time.sleep(0.2)  # until the other machine's answers have arrived
    runtime.cancel()
    second.until(lambda one: len(one.seen_of(Deliver)) == 2)
    cancel = second.seen_of(Deliver)[1]
    assert cancel.ranks == (2,) and cancel.job == 0
    assert len(first.seen_of(Deliver)) == 1
    answer = Failed(job=cancelled[0], kind="cancelled", error="The job was cancelled.")
    second.later.append(lambda machine: machine.say(2, answer))
    assert isinstance(result(), JobCancelled) and runtime.alive


def test_ranks_that_do_not_answer_a_cancel_are_asked_to_leave(runtime, machines, monkeypatch):
    monkeypatch.setattr("ascend_runtime.client.submission.CANCEL_DEADLINE", 0.2)
    said = []
    first, second = machines({"answer": lambda *_: None}, None)
    result = in_background(lambda: runtime.load(on_notice=said.append))
    first.until(lambda one: one.seen_of(Deliver))
    runtime.cancel()
    assert isinstance(result(), JobCancelled)
    assert "Last state: Rank 0 is on atlas1, Rank 1 is on atlas1" in said[-1]
    for machine in (first, second):
        machine.until(lambda one: one.seen_of(Leave) and one.welcomes == 2)  # and comes again


# Losses


@pytest.mark.parametrize("loss, text", [
    (lambda machine: machine.bury(2), "AV-1906: Rank 2 of 3, on the machine atlas2, has ended"),
    (lambda machine: machine.hang_up(), "AV-1906: The machine atlas2, with rank 2, was lost: the other side"),
    (lambda machine: machine.hang_up(ranks_end=False), "AV-1906: The machine atlas2, with rank 2, was lost"),
])  # fmt: skip
def test_a_loss_ends_the_job_and_the_next_one_runs(runtime, machines, loss, text):
    lost = []

    def answer(machine, deliver, message):
        if machine.name == "atlas2" and not lost:
            lost.append(True)
            loss(machine)
        elif machine.welcomes > 1:
            machine.done(deliver)

    first, second = machines(*({"answer": answer},) * 2)
    began = time.monotonic()
    with pytest.raises(RankDied, match=text) as caught:
        runtime.ping()
    assert "during: the job 'ping'" in str(caught.value) and time.monotonic() - began < 10
    first.until(lambda one: one.seen_of(Leave))
    assert "atlas2" in first.seen_of(Leave)[0].reason
    runtime.ping()
    assert first.group_now == second.group_now  # also if only the connection was lost: it is asked to start again


def test_a_death_by_the_kernel_is_one_for_want_of_memory(runtime, machines):
    machines(None, {"answer": lambda machine, deliver, message: machine.bury(2, by_kernel=True)})
    with pytest.raises(RankDied, match="AV-1501: Rank 2 of 3, on the machine atlas2, was killed by SIGKILL") as caught:
        runtime.ping()
    assert host.out_of_memory(str(caught.value)) and "What helps" in str(caught.value)


def test_a_death_for_want_of_memory_gives_the_job_one_more_try(runtime, machines):
    """With a plan that takes less, when torchrun has started the ranks again."""
    plans = [Chosen(parallel=ParallelSpec(), line=f"plan {size}", device=size) for size in (1000, 800)]
    kinds = []

    def answer(machine, deliver, message):
        kind = message["type"]
        kinds.append((machine.name, kind))
        if kind == "Choose":
            machine.done(deliver, info={"plan": msgspec.to_builtins(plans[message["below"] > 0])})
        elif kind == "Sample" and machine.name == "atlas2" and machine.welcomes == 1:
            machine.bury(2, by_kernel=True)
        elif not (kind == "Sample" and machine.welcomes == 1):
            machine.done(deliver, tensor=torch.ones(1))

    machines(*({"answer": answer},) * 2)
    said = []
    result = runtime.sample(DiffusionModelSpec(path="/m"), SampleSpec(steps=1), torch.zeros(1, 16, 1, 8, 8),
                            torch.zeros(1, 8, 4), on_notice=said.append)  # fmt: skip
    assert result.tensor.item() == 1 and result.info["plan"]["line"] == "plan 800"
    assert "ran out of memory" in said[-1] and "plan 800" in said[-1]
    assert [kind for name, kind in kinds if name == "atlas1"] == ["Choose", "Sample", "Free", "Choose", "Sample"]


def test_a_connection_that_was_cut_between_jobs_costs_no_ranks(runtime, machines):
    """They have kept their weights, and whoever comes again with the same group is the same."""
    first, second = machines()
    runtime.ping()
    second.later.append(lambda one: one.hang_up(ranks_end=False))
    second.until(lambda one: one.welcomes == 2)
    runtime.ping()
    assert not first.seen_of(Leave) + second.seen_of(Leave) and first.welcomes == 1
    second.delay = 0.3  # it comes while the job waits for it
    second.later.append(lambda one: one.hang_up(ranks_end=False))
    until(lambda: not runtime.alive)
    runtime.ping()
    assert not first.seen_of(Leave) + second.seen_of(Leave) and first.welcomes == 1


def test_an_interrupt_that_closes_a_connection_is_a_cut(runtime, machines):
    """As Ctrl+C does in the middle of reading it."""
    machines()
    runtime.ping()
    runtime._group.machines[1]._link.close()
    assert not runtime.alive and runtime.machines[0] == "atlas1"
    runtime.ping()


def test_a_machine_that_comes_again_with_other_ranks_is_not_taken_for_the_same(runtime, machines):
    first, second = machines()
    runtime.ping()
    second.later.append(PlayedMachine.hang_up)
    second.until(lambda one: one.welcomes == 2)
    result = in_background(runtime.ping)
    first.until(lambda one: one.seen_of(Leave))  # after which torchrun there starts the others too
    assert not isinstance(result(), Exception) and first.group_now == second.group_now


def test_a_rank_that_ended_between_jobs_is_not_waited_for(runtime, machines, monkeypatch):
    monkeypatch.setattr(cluster_group, "AGAIN_DEADLINE", 60)
    first, second = machines()
    runtime.ping()
    second.later.append(lambda one: one.bury(2))
    until(lambda: not runtime.alive)
    runtime.ping()
    assert first.seen_of(Leave) and second.seen_of(Leave)


def test_a_machine_that_was_lost_between_jobs_is_waited_for(runtime, machines, cluster, monkeypatch):
    monkeypatch.setattr(cluster_group, "AGAIN_DEADLINE", 0.1)
    first, second = machines()
    runtime.ping()
    second.vanish()
    until(lambda: not runtime.alive)
    assert runtime.machines == ["atlas1"]
    result = in_background(runtime.ping)
    first.until(lambda one: one.seen_of(Leave))  # its ranks belong to a group that cannot work
    with PlayedMachine(cluster, "atlas2", (2,)):
        assert not isinstance(result(), Exception)


def test_a_machine_that_comes_again_takes_its_own_place(runtime, machines, cluster):
    """Also if nobody has noticed yet that its last connection ended."""
    first, second = machines()
    runtime.ping()
    second.vanish()
    with PlayedMachine(cluster, "atlas2", (2,)) as again:
        again.until(lambda one: one.welcomes)
        runtime.ping()


# Life


def test_the_ranks_stay_for_the_next_client(cluster, machines):
    first, second = machines()
    for _ in range(2):
        with Runtime(cluster=cluster) as runtime:
            runtime.ping()
    assert not first.seen_of(Leave) and first.welcomes == second.welcomes == 2
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(cluster.address, timeout=1)


@pytest.mark.parametrize("end", [Runtime.stop, Runtime.cancel])
def test_a_call_that_waits_for_ranks_can_be_ended(runtime, cluster, end):
    with PlayedMachine(cluster, "atlas1", (0, 1)) as first:
        result = in_background(runtime.ping)
        first.until(lambda one: one.welcomes)
        end(runtime)
        assert isinstance(result(), JobCancelled)
        assert not first.seen_of(Leave)


def test_a_runtime_that_nobody_holds_closes_its_connections(cluster, machines):
    first, _ = machines()
    runtime = Runtime(cluster=cluster)
    runtime.ping()
    del runtime
    gc.collect()
    first.until(lambda one: one.ended)
    with Runtime(cluster=cluster) as other:
        other.ping()
    assert not first.seen_of(Leave)


def test_a_runtime_can_follow_at_once_on_one_that_nobody_holds(cluster, machines, monkeypatch):
    machines()
    runtime = Runtime(cluster=cluster)
    runtime.ping()
    monkeypatch.setattr(listener, "PACE", 0.2)  # the thread is slow to close its socket
    del runtime
    gc.collect()
    with Runtime(cluster=cluster) as other:
        other.ping()


def test_a_forked_child_neither_uses_nor_keeps_the_connections(runtime, machines, cluster):
    first, _ = machines()
    runtime.ping()
    mine, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(theirs)
            runtime.stop()
            try:
                runtime.ping()
            except RuntimeError as error:
                code = 0 if "forked child" in str(error) else 2
            os.read(mine, 1)  # until the parent is done
        finally:
            os._exit(code)
    runtime.ping()  # the child's stop has no effect
    runtime.stop()
    first.until(lambda one: one.ended)  # though the child has copies of the descriptors
    with Runtime(cluster=cluster) as other:
        other.ping()
    os.close(theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_is_left(cluster, machines):
    machines()
    before = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Runtime(cluster=cluster) as runtime:
            runtime.ping(frames=FRAMES)
    assert set(threading.enumerate()) == before[0]
    until(lambda: len(os.listdir("/proc/self/fd")) <= before[1] + 4)  # those of the machines' attempts


def test_words():
    named = [ranks_in_words(ranks) for ranks in ([0], [3, 1, 0, 5], range(8, 16))]
    assert named == ["rank 0", "ranks 0, 1, 3, 5", "ranks 8 to 15"]
