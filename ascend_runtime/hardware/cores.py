"""The CPU cores that this process may use: their number, how ranks share them, whether they compute in bfloat16. Uses
only the standard library.

Three limits apply: the process's CPU affinity, the CPU quota of its control groups (a container's `--cpus`), and the
user's OMP_NUM_THREADS, the number of threads per rank.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator, Mapping

from ..errors import coded
from . import cgroups
from .cgroups import PROCESS

BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of /proc/cpuinfo
THREADS_VARIABLE = "OMP_NUM_THREADS"
ALL_THREADS = "ASCEND_RUNTIME_ALL_THREADS"  # threads for work of a single rank; unset if the user sets OMP_NUM_THREADS


def usable_cores(process: Path = PROCESS) -> int:
    """The number of cores that this process may use: its CPU affinity, or less if a control group has a quota."""
    bound = len(os.sched_getaffinity(0))
    return max(1, int(min([bound, *_quotas(process)])))


def compute_bfloat16(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether all cores have instructions for products of bfloat16: avx512_bf16 or amx_bf16 on x86, bf16 on aarch64,
    which Kunpeng 920 lacks. Without them, torch computes such products more slowly than those of float32."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        return False
    listed = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return bool(listed) and not BFLOAT16.isdisjoint(set.intersection(*listed))


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
        raise ValueError(coded(
            "AV-1103",
            f"{THREADS_VARIABLE} is {given!r}; it can be the number of threads of each rank, such as 4. Unset it to "
            "share the cores evenly.",
        ))  # fmt: skip
    return {THREADS_VARIABLE: given}


def _quotas(process: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control groups and their parents."""
    yield from filter(None, map(_quota, cgroups.folders("cpu", process)))


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
