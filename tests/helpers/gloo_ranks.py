"""Ranks that a test starts by itself, joined by Gloo: for what the runtime's own ranks do not show.

A script of such ranks has a `main()`, which asks `join()` who it is. Networks are imported once: the ranks are forked
from a process that has done nothing else, those of one group after those of the other.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ascend_runtime.parallel import machines

TESTS = Path(__file__).resolve().parent
PRETENDED = "TESTS_PRETENDED_MACHINES"


def join():
    """In such a process, of one thread: (the folder, its number, how many there are). They meet in a file of the
    folder, at no port."""
    folder = Path(sys.argv[1]).resolve()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous-{ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    if PRETENDED in os.environ:
        machines.know_machines(os.environ[machines.MACHINE])
    return folder, rank, ranks


def run(script, folder, *groups, timeout=120, pretended_machines=()):
    """Runs `main()` of tests/`script` for FOLDER in so many processes, for each of `groups`; all must succeed.

    pretended_machines: the name of each rank's machine, though all are on this one; of one group.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    if pretended_machines:
        environment[PRETENDED] = ",".join(pretended_machines)
    command = [sys.executable, __file__, str(folder), script.removesuffix(".py"), *map(str, groups)]
    parent = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert parent.wait(timeout) == 0
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()


def _fork(main, rank):
    """The process id of a rank."""
    if child := os.fork():
        return child
    os.environ["RANK"] = str(rank)
    if PRETENDED in os.environ:
        names = os.environ[PRETENDED].split(",")
        os.environ |= {machines.MACHINE: names[rank], "LOCAL_WORLD_SIZE": str(names.count(names[rank]))}
    status = 1
    try:
        main()
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_forked():
    """The process that imports, forks, and waits: the first rank that fails ends the others."""
    sys.path.insert(0, str(TESTS))
    main = importlib.import_module(sys.argv[2]).main
    sys.exit(any(_fails(main, ranks) for ranks in sys.argv[3:]))


def _fails(main, ranks):
    os.environ["WORLD_SIZE"] = ranks
    waiting = {_fork(main, rank) for rank in range(int(ranks))}
    failed = False
    while waiting:
        child, status = os.wait()
        waiting.discard(child)
        if status and not failed:
            failed = True
            for other in waiting:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    _run_forked()
