"""The device of a rank: which there are, how to take one, and the backends that join them."""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import contextmanager
from functools import lru_cache
from typing import Iterable, Mapping

import psutil
import torch

from . import cores, host

logger = logging.getLogger(__name__)

LIBC = ctypes.CDLL(None)
CORES = frozenset(os.sched_getaffinity(0))  # the process's own: torch_npu binds threads once it has a card
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
KINDS = ("auto", "npu", "cuda", "cpu")


def resolve_kind(kind: str) -> str:
    """The kind of device meant by `kind`: "auto" takes NPUs, then CUDA devices, then the CPU."""
    if kind not in KINDS:
        raise ValueError(f"device is {kind!r}; it can be one of {', '.join(KINDS)}.")
    if kind == "auto":
        found = next(k for k in ("npu", "cuda", "cpu") if count_visible(k))
        if found != "npu":
            host.warn_of_idle_npus()
        return found
    if not count_visible(kind):
        reasons = " ".join(["", *host.problems()]) if kind == "npu" else ""
        raise ValueError(
            f"device is {kind!r}, but no such device is visible. Set it to 'auto' to take what there is.{reasons}"
        )
    return kind


def count_visible(kind: str, environ: Mapping[str, str] = os.environ) -> int:
    """Devices of one kind that a process with this environment sees, counted without starting a driver; a CPU is one.

    CUDA devices are those that this process sees.
    """
    if kind == "npu":
        return host.visible_cards(environ)
    return torch.cuda.device_count() if kind == "cuda" else 1


def resolve_ranks(ranks: int, kind: str, environ: Mapping[str, str] = os.environ) -> int:
    """How many ranks to start when `ranks` are asked for: 0 means one a device that `environ` makes visible.

    Raises ValueError for more ranks than accelerators. On a CPU any number runs; they share its cores.
    """
    visible = count_visible(kind, environ)
    if kind != "cpu" and ranks > visible:
        raise ValueError(
            f"{ranks} ranks were asked for, but {visible} {kind} device(s) are visible. "
            "Set ranks to 0 to use what there is, or make more devices visible."
        )
    return ranks or visible


def warn_if_crowded(ranks: int, kind: str) -> None:
    """Says so where more ranks than cores are to compute on a CPU."""
    usable = cores.usable()
    if kind == "cpu" and ranks > usable:
        logger.warning(
            "%d ranks were asked for, but there are %d CPU core(s): the ranks will wait for each other. "
            "Set ranks to %d or fewer, or to 0 for one.", ranks, usable, usable,
        )  # fmt: skip


def take(kind: str, local_rank: int) -> torch.device:
    """Makes the device of this rank current."""
    if kind == "cpu":
        return torch.device("cpu")
    if not hasattr(torch, kind):
        raise RuntimeError(
            f"torch has no {kind!r} devices in this process. Is torch_npu installed for this torch, and is "
            "TORCH_DEVICE_BACKEND_AUTOLOAD not 0?"
        )
    if kind == "npu":
        # Operators come compiled with CANN: compiling each shape at its first use takes minutes. And tensors stay in
        # the layout that torch knows, as ranks exchange them and networks view them.
        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.config.allow_internal_format = False
        torch.npu.conv.allow_hf32 = False  # float32 is asked for where it is needed: in the VAE
    device = torch.device(kind, local_rank)
    getattr(torch, kind).set_device(device)
    return device


# SoC versions: torch_npu 2.13.0, NpuVariables.h. The names are the product lines'.
_CARDS = {"duo": range(200, 206), "a2": range(220, 226), "a3": range(250, 257), "a5": range(260, 261)}


@lru_cache(maxsize=None)
def card(device: torch.device) -> str | None:
    """The line of an NPU: "a2" (910B), "a3" (910_93), "a5" (950), "duo" (310P, 300I Duo); None for all else."""
    if device.type != "npu":
        return None
    soc = torch.npu.utils.get_soc_version()
    return next((line for line, versions in _CARDS.items() if soc in versions), None)


def default_dtype(device: torch.device) -> torch.dtype:
    """What a diffusion network computes in, where it is not told: float32 on a CPU, else bfloat16 where the card has
    it, as Wan's attention overflows in float16; an NPU without bfloat16 (300I Duo) is left with float16."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "npu" and not torch.npu.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def synchronise(device: torch.device) -> None:
    """Waits until `device` has done what was queued on it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Gives unused device memory back to the driver; a CPU's to the kernel."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
    elif hasattr(LIBC, "malloc_trim"):  # of glibc alone
        LIBC.malloc_trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None for a CPU, where the kernel decides."""
    return None if device.type == "cpu" else getattr(torch, device.type).mem_get_info(device)[0]


def host_memory() -> int:
    """Bytes of the host's memory that processes can still take."""
    return psutil.virtual_memory().available


def room(device: torch.device) -> int:
    """Bytes that this rank can compute in: what is free on its card, and what the allocator holds for it; of a CPU's
    memory, this rank's part of what is available."""
    if device.type == "cpu":
        return host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    card = getattr(torch, device.type)
    return free_memory(device) + card.memory_reserved(device) - card.memory_allocated(device)


class SideStream:
    """Copies that run beside what `device` computes; on a CPU they are done at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = None if device.type == "cpu" else getattr(torch, device.type).Stream(device)

    @contextmanager
    def after_now(self):
        """What is queued inside begins when all that the device has been given so far is done."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(getattr(torch, self._device.type).current_stream(self._device))
        with getattr(torch, self._device.type).stream(self._stream):
            yield

    def join(self) -> None:
        """What the device is given from now on begins when the copies are done."""
        if self._stream is not None:
            getattr(torch, self._device.type).current_stream(self._device).wait_stream(self._stream)


@contextmanager
def all_cores():
    """Lets this rank compute on every core of the process: for work that no other rank shares. A user's own number of
    threads stays as it is.

    With CPU_AFFINITY_CONF torch_npu has bound the threads of a rank to some cores; they get these back afterwards.
    """
    threads, bound = torch.get_num_threads(), _affinities()
    for thread in bound:
        _bind(thread, CORES)
    torch.set_num_threads(int(os.environ.get(cores.ALL_THREADS) or threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for thread in _affinities():  # those that were started meanwhile follow the main thread
            _bind(thread, bound.get(thread, bound[os.getpid()]))


def _affinities() -> dict[int, set[int]]:
    """The cores of each thread of this process."""
    found = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        try:
            found[thread] = os.sched_getaffinity(thread)
        except ProcessLookupError:
            pass  # it has ended
    return found


def _bind(thread: int, to: Iterable[int]) -> None:
    try:
        os.sched_setaffinity(thread, to)
    except ProcessLookupError:
        pass  # it has ended
