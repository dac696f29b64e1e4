"""This process's control groups, which limit a container's cores and memory. Uses only the standard library."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Iterator

PROCESS = Path("/proc/self")


def folders(controller: str, process: Path = PROCESS) -> Iterator[Path]:
    """The folders of this process's groups of a controller, such as cpu or memory, and of their parents.

    Linux lists the groups in /proc/self/cgroup and their mount points in /proc/self/mountinfo (cgroups(7)). In cgroup
    v2, one hierarchy has the files of all controllers.
    """
    try:
        mounts = (process / "mountinfo").read_text().splitlines()
        groups = dict(_groups((process / "cgroup").read_text()))
    except OSError:
        return  # not Linux, or no /proc
    for line in mounts:
        place, _, source = (part.split(" ") for part in line.partition(" - "))
        kind, options = source[0], source[-1]
        listed = {"cgroup2": "", "cgroup": controller}.get(kind)
        if listed in groups and (kind == "cgroup2" or controller in options.split(",")):
            root, point = place[3:5]
            yield from _visible(Path(point), root, groups[listed])


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """(controller, path of the group) for each line of /proc/self/cgroup; cgroup v2 has one line with no controller."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _visible(point: Path, root: str, group: str) -> Iterator[Path]:
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
