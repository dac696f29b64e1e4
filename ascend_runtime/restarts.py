"""Ranks from before this process replaced itself (os.execv), as ComfyUI-Manager's restart does.

The kernel kills them then, but they stay this process's children, and nobody in the new program waits for them. A
variable is all that outlives the restart: it holds their process ids.
"""

import os
import threading

VARIABLE = "ASCEND_RUNTIME_RANKS"

_pids: set[int] = set()
_one_at_a_time = threading.Lock()


def remember(pid: int) -> None:
    """A rank of this process has started."""
    _change(_pids.add, pid)


def forget(pid: int) -> None:
    """It has ended, and was waited for."""
    _change(_pids.discard, pid)


def reap() -> None:
    """Waits for the ranks that a restart has killed. To be called before any rank is started."""
    for pid in os.environ.pop(VARIABLE, "").split():
        try:
            os.waitpid(int(pid), os.WNOHANG)
        except (ValueError, OverflowError, ChildProcessError):
            pass  # the variable came from a parent process, whose children they are


def _change(change, pid: int) -> None:
    with _one_at_a_time:
        change(pid)
        os.environ[VARIABLE] = " ".join(map(str, sorted(_pids)))
