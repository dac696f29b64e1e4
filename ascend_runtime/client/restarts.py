"""Reaps ranks after this process has replaced itself (os.execv), as ComfyUI-Manager's restart does.

The kernel kills the ranks then, but they stay zombie children of this process. Their process ids are kept in an
environment variable, which survives the restart.
"""

import os
import threading

PIDS_VARIABLE = "ASCEND_RUNTIME_RANKS"

_pids: set[int] = set()
_before: set[int] = set()  # ranks of the previous program that are not reaped yet
_one_at_a_time = threading.Lock()


def remember(pid: int) -> None:
    """Records a started rank."""
    _reap(_before)
    _change(_pids.add, pid)


def forget(pid: int) -> None:
    """Removes a rank that has been reaped."""
    _change(_pids.discard, pid)


def reap() -> None:
    """Reaps the ranks that a restart has killed, or, if one is still dying, when the next rank starts. Must be called
    before any rank is started."""
    _before.update(int(pid) for pid in os.environ.pop(PIDS_VARIABLE, "").split() if pid.isdecimal() and len(pid) < 9)
    _reap(_before)


def _reap(pids: set[int]) -> None:
    for pid in tuple(pids):
        try:
            dead = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            dead = True  # reaped, or the variable was inherited from a parent process
        if dead:
            pids.discard(pid)


def _change(change, pid: int) -> None:
    with _one_at_a_time:
        change(pid)
        os.environ[PIDS_VARIABLE] = " ".join(map(str, sorted(_pids)))
