"""Ranks that cannot start say why, what ranks print reaches the log, and stopping leaves nothing."""

import logging
import os
import time
from pathlib import Path

import pytest
from ascend_runtime import RankDied
from rank_processes import environment_of, seconds_until


@pytest.fixture
def broken_msgspec(tmp_path):
    """An environment in which the module msgspec does what a test says, as a broken installation would."""

    def environment(code):
        (tmp_path / "msgspec.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path)}

    return environment


SAY_AND_FAIL = """
import os, sys
if os.environ["RANK"] == "1":
    print("on standard output", flush=True)
    print("on standard error", file=sys.stderr, flush=True)
    raise ImportError("libhccl.so: cannot open shared object file")
import time
time.sleep(60)
"""


def test_a_rank_that_dies_at_start_says_why(new_runtime, broken_msgspec, marked, caplog):
    environment, living = marked
    runtime = new_runtime(3, **environment, **broken_msgspec(SAY_AND_FAIL))
    with caplog.at_level(logging.INFO), pytest.raises(RankDied) as error:
        runtime.ping()
    assert str(error.value).startswith("AV-1002: Rank 1 of 3 ")
    for words in ("Rank 1 of 3 ended with exit code 1", "Traceback", "ImportError: libhccl.so: cannot open shared"):
        assert words in str(error.value)
    assert "rank 1 | on standard output" in caplog.text and "rank 1 | on standard error" in caplog.text
    seconds_until(lambda: not living(), 3.0)
    assert not runtime.alive and runtime.pids == []
    runtime.stop()


def test_a_start_that_takes_too_long(new_runtime, broken_msgspec, marked):
    environment, living = marked
    deadline = {"ASCEND_RUNTIME_START_DEADLINE": "2"}
    runtime = new_runtime(2, **environment, **deadline, **broken_msgspec("import time; time.sleep(60)"))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="^AV-1505: Rank 0 .* not ready within 2 s.*_START_DEADLINE"):
        runtime.ping()
    assert time.monotonic() - began < 10
    seconds_until(lambda: not living(), 3.0)
    runtime.stop()


def test_stop_ends_the_ranks_and_the_next_job_starts_them(new_runtime, marked):
    environment, living = marked
    runtime = new_runtime(2, **environment)
    assert not runtime.alive and runtime.pids == [] and not living()
    runtime.ping()
    first = runtime.pids
    assert sorted(living().values()) == sorted(first)
    descriptors = len(os.listdir("/proc/self/fd"))

    runtime.stop()
    assert not runtime.alive and not living()
    assert not any(Path(f"/proc/{pid}").exists() for pid in first), "a rank was not waited for"
    assert len(os.listdir("/proc/self/fd")) < descriptors

    runtime.ping()
    assert runtime.alive and not set(runtime.pids) & set(first)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    runtime.stop()
    runtime.stop()
    assert not living()


def test_ranks_know_torchruns_variables(two_ranks):
    for rank, pid in enumerate(two_ranks.pids):
        environment = environment_of(pid)
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank) and environment["WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_ranks_listen_on_the_loopback_alone(two_ranks):
    """Sockets of the ranks that listen, as /proc/net shows them."""
    inodes = set()
    for pid in two_ranks.pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening[fields[1]] = fields[9]
    loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
    assert listening and all(address.startswith(loopback) for address in listening), listening
