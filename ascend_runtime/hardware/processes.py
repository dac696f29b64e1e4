"""Parents of processes, and deaths with them. Uses only the standard library."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int, sign: signal.Signals = signal.SIGKILL) -> None:
    """Makes the kernel send this process a signal when its parent ends, to SIGKILL it by default. The setting survives
    execve. Ends this process if the parent is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, sign)
    if os.getppid() != parent:
        sys.exit("The process that started this one is gone.")


def parent_of(process: int) -> int | None:
    """The parent of a process of this user, from proc_pid_stat(5); None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)
