"""Parents of processes, deaths with them, and which process a number means. Uses only the standard library."""

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
    state, parent = (_stat(process) or ["X", "0"])[:2]
    return None if state in "ZX" else int(parent)


def start_of(process: int) -> int | None:
    """When a process began, in clock ticks since the host did: another process with its number began later. None if
    there is none with this number."""
    found = _stat(process)
    return int(found[19]) if found else None


def _stat(process: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third one on, the state; empty if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
