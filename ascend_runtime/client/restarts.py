"""Ranks from before this process replaced itself (os.execv), as ComfyUI-Manager's restart does.

The kernel kills them then, but they stay this process's children, and nobody in the new program waits for them. A
variable is all that outlives the restart: it holds their process ids.
"""

import os
import threading

VARIABLE = "ASCEND_RUNTIME_RANKS"

_pids: set[int] = set()
_before: set[int] = set()  # of the program before, and not dead yet when they were looked at
_one_at_a_time = threading.Lock()


def remember(pid: int) -> None:
    """A rank of this process has started."""
    _reap(_before)
    _change(_pids.add, pid)


def forget(pid: int) -> None:
    """It has ended, and was waited for."""
    _change(_pids.discard, pid)


def reap() -> None:
    """Takes leave of the ranks that a restart has killed; of one that still dies, when the next rank starts. To be
    called before any rank is started."""
    _before.update(int(pid) for pid in os.environ.pop(VARIABLE, "").split() if pid.isdecimal() and len(pid) < 9)
    _reap(_before)


def _reap(pids: set[int]) -> None:
    for pid in tuple(pids):
        try:
            dead = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            dead = True  # or of a parent process, from which the variable came
        if dead:
            pids.discard(pid)


def _change(change, pid: int) -> None:
    with _one_at_a_time:
        change(pid)
        os.environ[VARIABLE] = " ".join(map(str, sorted(_pids)))
