"""The host's memory: what is available, also to a container, and how pinned memory is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil

from . import cgroups

ROOM = 8 * 2**30  # bytes of the host's memory that must stay free: frames, previews, files that are being read


def available(process: Path = cgroups.PROCESS) -> int:
    """The bytes that this host can still give to processes: the kernel's MemAvailable, or less if a control group of
    this process has a limit (a container's `--memory`). Cached files count as available."""
    return min([psutil.virtual_memory().available, *_left_by_groups(process)])


def kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """The number of processes that the kernel has killed since it started because memory was full: the host's, or that
    of a control group. 0 for kernels before 4.13, which do not count them."""
    try:
        counts = dict(line.split() for line in vmstat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counts.get("oom_kill", 0))


def _left_by_groups(process: Path) -> list[int]:
    return [left for folder in cgroups.folders("memory", process) if (left := _left(folder)) is not None]


def _left(folder: Path) -> int | None:
    """A group's limit without what it uses, in bytes; None without a limit. Files: the kernel's cgroup-v2 and
    cgroup-v1/memory documents."""
    try:
        if (folder / "memory.max").exists():  # cgroup v2
            limit, used, prefix = (folder / "memory.max"), (folder / "memory.current"), ""
        else:
            limit, used, prefix = (folder / "memory.limit_in_bytes"), (folder / "memory.usage_in_bytes"), "total_"
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        return max(0, int(limit.read_text()) - int(used.read_text()) + cached)
    except (OSError, ValueError, KeyError):
        return None  # no limit ("max"), or the root group, which has no such file
