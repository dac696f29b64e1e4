"""Checks of processes: ranks that are left from before, and ended ones that nobody removes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from resource import getpagesize

from ...hardware.host import HostFault
from .findings import Finding, error, fine, warning
from .surroundings import Surroundings

WORKER = "ascend_runtime.engine.worker"
_PARENT = "ASCEND_RUNTIME_PARENT"  # the process that started a rank; see client/group.py
_MOST_BYTES = 2**17  # of a file of a process; Linux allows more, a rank has less
_ENDING = 0.5  # seconds; the kernel ends ranks when their client ends, but not at the same moment
_MANY_ENDED = 50
_STATES = {"Z": "ended", "D": "blocked in the kernel, as by a driver"}


@dataclass(frozen=True)
class RunningProcess:
    """pid, parent: process ids. state: a letter, see proc_pid_stat(5). born: clock ticks since the machine's start.
    resident: bytes of memory."""

    pid: int
    parent: int
    state: str
    born: int
    resident: int


def pids(around: Surroundings) -> set[int]:
    return {int(folder.name) for folder in around.proc.glob("[0-9]*") if folder.name.isdigit()}


def _left_ranks(around: Surroundings) -> Iterator[Finding]:
    ranks, left = _ranks(around)
    if left:
        time.sleep(_ENDING)
        still = {one.pid for one in _ranks(around)[1]}
        left = [one for one in left if one.pid in still]
    for one in left:
        doing = f", is {_STATES[one.state]}," if one.state in _STATES else ""
        yield error("ranks", HostFault(
            "AV-1111",
            f"Process {one.pid} is a rank whose ComfyUI has ended{doing} and holds {one.resident / 1e9:.1f} GB of host "
            "memory and its card.",
            f"`kill -9 {one.pid}`. If it stays, its driver hangs: restart the machine or the container.",
        ))  # fmt: skip
    if not left:
        yield fine("ranks", f"{len(ranks)} in use, none is left from before")


def _ranks(around: Surroundings) -> tuple[list[RunningProcess], list[RunningProcess]]:
    """All ranks that run, and those of them that are left."""
    running = {pid: one for pid in pids(around) if (one := _process(around, pid))}
    ranks = [one for one in running.values() if _is_rank(around, one.pid) and one.state != "Z"]
    return ranks, [one for one in ranks if not _in_use(around, one, running)]


def _ended(around: Surroundings) -> Iterator[Finding]:
    count = sum(1 for pid in pids(around) if (one := _process(around, pid)) and one.state == "Z")
    if count < _MANY_ENDED:
        yield fine("ended processes", f"{count} wait to be removed by the process that started them")
    else:
        yield warning("ended processes", HostFault(
            "AV-1113",
            f"{count} ended processes are still listed, and count for the limit of processes.",
            "Restart the program that started them (`ps -eo ppid,stat,comm`), or the container, with `docker run "
            "--init`.",
        ))  # fmt: skip


def ranks_in_use(around: Surroundings) -> set[int]:
    """The process ids of ranks whose client lives."""
    ranks, left = _ranks(around)
    return {one.pid for one in ranks} - {one.pid for one in left}


def _is_rank(around: Surroundings, pid: int) -> bool:
    """Not torchrun, in whose command the worker's options follow."""
    return WORKER == _read(around, pid, "cmdline").rstrip("\0").rpartition("\0")[2]


def _in_use(around: Surroundings, rank: RunningProcess, running: dict[int, RunningProcess]) -> bool:
    """Whether the process that started a rank is among its ancestors. If another user's variables cannot be read:
    whether an ancestor is a Python that is not a rank."""
    variables = dict(pair.partition("=")[::2] for pair in _read(around, rank.pid, "environ").split("\0"))
    client = variables.get(_PARENT, "")
    one = running.get(rank.parent)
    while one is not None and one.born <= rank.born:
        if client in _numbers_of(around, one.pid) if client else _is_client(around, one.pid):
            return True
        one = running.get(one.parent)
    return False


def _is_client(around: Surroundings, pid: int) -> bool:
    return "python" in _read(around, pid, "cmdline").partition("\0")[0] and not _is_rank(around, pid)


def _numbers_of(around: Surroundings, pid: int) -> list[str]:
    """The numbers of a process, here and in the container that it runs in (NSpid of proc_pid_status(5))."""
    lines = _read(around, pid, "status").splitlines()
    return next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [str(pid)])


def _process(around: Surroundings, pid: int) -> RunningProcess | None:
    fields = _read(around, pid, "stat").rpartition(")")[2].split()
    if len(fields) < 22:
        return None  # it has ended meanwhile
    # Fields are counted from 1 in proc_pid_stat(5); the state is the third.
    return RunningProcess(pid, int(fields[1]), fields[0], int(fields[19]), getpagesize() * int(fields[21]))


def _read(around: Surroundings, pid: int, name: str) -> str:
    try:
        with (around.proc / str(pid) / name).open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""  # it has ended, or belongs to another user


PROCESS_CHECKS = (_left_ranks, _ended)
