"""How many CPU cores this process may use, and how ranks share them. Standard library only.

Three things bound the number: the cores that the process is bound to, the CPU quota of its control groups (a
container's `--cpus`), and the user, who says how many threads a rank is to have by OMP_NUM_THREADS.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping

PROCESS = Path("/proc/self")
THREADS = "OMP_NUM_THREADS"
ALL_THREADS = "ASCEND_RUNTIME_ALL_THREADS"  # of a rank for work that no other rank shares; unset where the user decides


def usable(process: Path = PROCESS) -> int:
    """Cores that this process may keep busy: those it is bound to, or fewer where a control group has a quota."""
    bound = len(os.sched_getaffinity(0))
    return max(1, int(min([bound, *_quotas(process)])))


def shared(ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that say how many threads each of `ranks` ranks on this machine has: the user's OMP_NUM_THREADS,
    else an equal part of the usable cores.

    Raises ValueError for an OMP_NUM_THREADS that is no list of positive numbers.
    """
    asked = environ.get(THREADS, "").strip()
    if not asked:
        cores = usable()
        return {THREADS: str(max(1, cores // ranks)), ALL_THREADS: str(cores)}
    if not all(number.strip().isdecimal() and int(number) > 0 for number in asked.split(",")):
        raise ValueError(f"{THREADS} is {asked!r}; it can be the number of threads that each rank has, such as 4. "
                         "Unset it to share the cores out evenly.")  # fmt: skip
    return {THREADS: asked}


def _quotas(process: Path) -> Iterator[float]:
    """The quota of each control group that this process is in, in cores: its own group's and those above it.

    Linux lists the groups in /proc/self/cgroup and where they are mounted in /proc/self/mountinfo (cgroups(7)).
    """
    try:
        mounts = (process / "mountinfo").read_text().splitlines()
        groups = dict(_groups((process / "cgroup").read_text()))
    except OSError:
        return  # no Linux, or no /proc
    for line in mounts:
        place, _, source = (part.split(" ") for part in line.partition(" - "))
        kind, options = source[0], source[-1]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller in groups and (kind == "cgroup2" or controller in options.split(",")):
            root, point = place[3:5]
            yield from filter(None, map(_quota, _folders(Path(point), root, groups[controller])))


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """(controller, path of the group) of each line of /proc/self/cgroup; cgroup v2 has one line, with no controller."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _folders(point: Path, root: str, group: str) -> Iterator[Path]:
    """The folders of a group and of those above it, as far as they can be seen from here.

    point: where the hierarchy is mounted; root: which of its groups is there, as a container may see only its own.
    """
    try:
        inside = PurePosixPath(group).relative_to(root)
    except ValueError:
        inside = PurePosixPath()  # the mount shows other groups than this process' own
    if ".." in inside.parts:
        inside = PurePosixPath()
    yield point
    for depth in range(len(inside.parts)):
        yield point.joinpath(*inside.parts[: depth + 1])


def _quota(folder: Path) -> float | None:
    """Cores: the time that a group may compute in each period, by the length of that."""
    try:
        if (folder / "cpu.max").exists():  # cgroup v2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # "max" and -1: no quota; the root group has no such file
