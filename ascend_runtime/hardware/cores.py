"""The number of CPU cores that this process may use, and how ranks share them. Uses only the standard library.

Three limits apply: the process's CPU affinity, the CPU quota of its control groups (a container's `--cpus`), and the
user's OMP_NUM_THREADS, the number of threads per rank.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping

PROCESS = Path("/proc/self")
THREADS_VARIABLE = "OMP_NUM_THREADS"
ALL_THREADS = "ASCEND_RUNTIME_ALL_THREADS"  # threads for work of a single rank; unset if the user sets OMP_NUM_THREADS


def usable_cores(process: Path = PROCESS) -> int:
    """The number of cores that this process may use: its CPU affinity, or less if a control group has a quota."""
    bound = len(os.sched_getaffinity(0))
    return max(1, int(min([bound, *_quotas(process)])))


def thread_variables(ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables for the number of threads of each of `ranks` ranks: the user's OMP_NUM_THREADS, else an
    equal part of the usable cores.

    Raises ValueError if OMP_NUM_THREADS is not a list of positive numbers.
    """
    given = environ.get(THREADS_VARIABLE, "").strip()
    if not given:
        cores = usable_cores()
        return {THREADS_VARIABLE: str(max(1, cores // ranks)), ALL_THREADS: str(cores)}
    if not all(number.strip().isdecimal() and int(number) > 0 for number in given.split(",")):
        raise ValueError(f"{THREADS_VARIABLE} is {given!r}; it can be the number of threads of each rank, such as 4. "
                         "Unset it to share the cores evenly.")  # fmt: skip
    return {THREADS_VARIABLE: given}


def _quotas(process: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control groups and their parents.

    Linux lists the groups in /proc/self/cgroup and their mount points in /proc/self/mountinfo (cgroups(7)).
    """
    try:
        mounts = (process / "mountinfo").read_text().splitlines()
        groups = dict(_groups((process / "cgroup").read_text()))
    except OSError:
        return  # not Linux, or no /proc
    for line in mounts:
        place, _, source = (part.split(" ") for part in line.partition(" - "))
        kind, options = source[0], source[-1]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller in groups and (kind == "cgroup2" or controller in options.split(",")):
            root, point = place[3:5]
            yield from filter(None, map(_quota, _folders(Path(point), root, groups[controller])))


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """(controller, path of the group) for each line of /proc/self/cgroup; cgroup v2 has one line with no controller."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _folders(point: Path, root: str, group: str) -> Iterator[Path]:
    """The folders of a group and its parents, as far as they are visible.

    point: the mount point of the hierarchy. root: the group mounted there, as a container may see only its own.
    """
    try:
        inside = PurePosixPath(group).relative_to(root)
    except ValueError:
        inside = PurePosixPath()  # this process's group is outside of the mount
    if ".." in inside.parts:
        inside = PurePosixPath()
    yield point
    for depth in range(len(inside.parts)):
        yield point.joinpath(*inside.parts[: depth + 1])


def _quota(folder: Path) -> float | None:
    """A group's quota in cores: its CPU time per period, divided by the period. None without a quota."""
    try:
        if (folder / "cpu.max").exists():  # cgroup v2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no quota ("max" or -1), or the root group, which has no such file
