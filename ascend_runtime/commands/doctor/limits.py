"""Checks of the host's memory and cores, of the limits of processes and containers, and of variables."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ...hardware import cgroups, cores, host
from ...hardware.host import HostFault
from .findings import Finding, error, errors_or, fine, warning
from .surroundings import Surroundings

# Host bytes of Wan's text encoder on a CPU, 5.7 billion parameters, in bfloat16 and in float32.
_ENCODER = {True: 11.4e9, False: 22.7e9}
# Host bytes that a rank pins for A14B's two experts in bfloat16 if they take turns, as they are allocated: see
# components/pinned.py.
_EXPERTS = 58.5e9
_RANK_THREADS = 64  # of a rank, besides those that compute: of the driver, HCCL or NCCL, Gloo, its connections
_RANK_FILES, _OTHER_FILES = 64, 256  # open files of a rank, with its sockets and shared memory; of ComfyUI
_SMALL_SHM = 2**29  # bytes; NCCL's channels take some MB for each pair of GPUs, and docker's default is 64 MB


def _memory(around: Surroundings) -> Iterator[Finding]:
    """What fits into the host's memory, or into the part of it that a container may use."""
    try:
        from ...hardware import memory as host_memory
    except ImportError:
        yield fine("host memory", "not checked: psutil is missing")
        return
    free, whole = host_memory.available(around.process), _kernel_available(around)
    encoder = _ENCODER[cores.compute_bfloat16(around.proc / "cpuinfo")]
    if free >= encoder + host_memory.ROOM:
        yield fine("host memory", f"{free / 1e9:.0f} GB are free: {_fitting(around, free, encoder)}")
        return
    found = (f"{free / 1e9:.1f} GB of memory are free, but Wan's text encoder takes {encoder / 1e9:.0f} GB on the CPU, "
             f"and {host_memory.ROOM / 1e9:.0f} GB are left to frames and files.")  # fmt: skip
    cure = "add memory" if around.kind == "cpu" else "set the text encoder's placement to ranks"
    if whole is not None and whole > 1.5 * free:
        yield warning("host memory", HostFault(
            "AV-1107", f"In this container, {found}",
            f"Raise its limit (`docker run --memory`), as the machine has {whole / 1e9:.0f} GB free, or {cure}.",
        ))  # fmt: skip
    else:
        yield warning("host memory", HostFault("AV-1106", found, f"End other programs, or {cure}."))


def _fitting(around: Surroundings, free: float, encoder: float) -> str:
    text = f"Wan's text encoder fits on the CPU ({encoder / 1e9:.0f} GB)"
    if around.kind == "cpu":
        return text
    pinned = around.ranks * _EXPERTS
    ways = "can take turns" if encoder + pinned < free else "cannot take turns, but share cards by fsdp"
    return f"{text}; A14B's two experts, {pinned / 1e9:.0f} GB for {around.ranks} rank(s), {ways}"


def _kernel_available(around: Surroundings) -> int | None:
    """The kernel's MemAvailable, in bytes."""
    try:
        lines = (around.proc / "meminfo").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _bfloat16(around: Surroundings) -> Iterator[Finding]:
    if cores.compute_bfloat16(around.proc / "cpuinfo"):
        yield fine("bfloat16 on the CPU", "the CPU has instructions for it")
        return
    cure = "Set the text encoder's placement to ranks if the cards have room." if around.kind != "cpu" else (
        "Leave dtype at auto, which is float32 on a CPU."
    )  # fmt: skip
    yield warning("bfloat16 on the CPU", HostFault(
        "AV-1108", "The CPU has no bfloat16 instructions, so that what runs on it computes in float32: twice the "
        "memory, and slower.", cure,
    ))  # fmt: skip


def _core_count(around: Surroundings) -> Iterator[Finding]:
    if around.cores >= around.ranks:
        yield fine("cores", f"{around.cores} for {around.ranks} rank(s)")
        return
    yield warning("cores", HostFault(
        "AV-1109", f"This process may use {around.cores} core(s), but {around.ranks} ranks start.",
        "Give the container more (`docker run --cpus`, `--cpuset-cpus`), check `taskset -p`, or use fewer ranks.",
    ))  # fmt: skip


def _threads(around: Surroundings) -> Iterator[Finding]:
    """Whether the limits of the user and of the container leave room for all ranks' threads."""
    needed = around.ranks * _RANK_THREADS + 2 * around.cores
    own = around.limit(resource.RLIMIT_NPROC)
    left = [own] if own is not None else []
    for folder in cgroups.folders("pids", around.process):
        left += [most - (_number(folder / "pids.current") or 0)
                 for most in [_number(folder / "pids.max")] if most is not None]  # fmt: skip
    if not left or min(left) >= needed:
        yield fine("threads", f"at least {min(left)} more may start" if left else "no limit")
        return
    yield error("threads", HostFault(
        "AV-1102", f"{min(left)} threads or processes may start, but {around.ranks} rank(s) take about {needed}.",
        "Raise `ulimit -u`, or a container's limit (`docker run --pids-limit`).",
    ))  # fmt: skip


def _number(file: Path) -> int | None:
    """A number in a control group's file; None for "max", or without the file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _open_files(around: Surroundings) -> Iterator[Finding]:
    most, needed = around.limit(resource.RLIMIT_NOFILE), _OTHER_FILES + around.ranks * _RANK_FILES
    if most is None or most >= needed:
        yield fine("open files", "no limit" if most is None else f"at most {most}")
        return
    yield error("open files", HostFault(
        "AV-1110", f"A process may have {most} files open, but ComfyUI with {around.ranks} rank(s) may need {needed}.",
        f"`ulimit -n {max(1024, needed)}` in the shell that starts ComfyUI, or `docker run --ulimit nofile=65536`.",
    ))  # fmt: skip


def _shared_memory(around: Surroundings) -> Iterator[Finding]:
    """Whether ComfyUI and ranks can share memory, and NCCL its channels. Locked memory needs no check: drivers lock
    pinned memory themselves, which `ulimit -l` does not limit."""
    try:
        os.close(os.memfd_create("ascend-doctor"))
    except OSError as failure:
        yield error("shared memory", HostFault(
            "AV-1208", f"Shared memory cannot be created ({failure.strerror}).",
            "Allow memfd_create, which a seccomp profile or a sandbox may forbid.",
        ))  # fmt: skip
        return
    try:
        space = around.size_of(around.root / "dev/shm")
    except OSError:
        space = None
    if around.kind == "cuda" and (space is None or space.total < _SMALL_SHM):
        size = "There is no /dev/shm" if space is None else f"/dev/shm has only {space.total / 1e6:.0f} MB"
        yield warning("shared memory", HostFault(
            "AV-1208", f"{size}, through which NCCL sends between GPUs that are not linked.",
            "Start the container with `--shm-size 8g`, or `--ipc host`.",
        ))  # fmt: skip
    else:
        yield fine("shared memory", "can be created")


def _variables(around: Surroundings) -> Iterator[Finding]:
    """Whether the variables of ranks have values that are valid on these devices."""
    try:
        from ...hardware import environment
    except ImportError:
        yield fine("variables", "not checked: msgspec is missing")
        return
    faults = []
    if around.kind == "npu":
        faults += environment.npu_variable_faults(around.environ, {}, host.npu_line())
    for read in (environment.start_deadline, lambda environ: cores.thread_variables(1, environ)):
        try:
            read(around.environ)
        except ValueError as failure:
            found, _, cure = str(failure).partition(": ")[2].partition(". ")
            faults.append(HostFault("AV-1103", f"{found}.", cure))
    yield from errors_or("variables", faults, "all values are valid")


LIMIT_CHECKS = (_memory, _core_count, _bfloat16, _threads, _open_files, _shared_memory, _variables)
