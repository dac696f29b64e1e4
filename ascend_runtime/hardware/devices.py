"""Finds and selects the devices of ranks; names their torch.distributed backends."""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import contextmanager
from functools import lru_cache
from typing import Iterable, Mapping

import torch

from . import cores, host, memory

logger = logging.getLogger(__name__)

LIBC = ctypes.CDLL(None)
CORES = frozenset(os.sched_getaffinity(0))  # the process's affinity, before torch_npu binds its threads
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
DEVICE_KINDS = ("auto", "npu", "cuda", "cpu")


def resolve_kind(kind: str) -> str:
    """Resolves "auto" to the first available kind: NPUs, then CUDA devices, then the CPU. Raises ValueError."""
    if kind not in DEVICE_KINDS:
        raise ValueError(f"device is {kind!r}; it can be one of {', '.join(DEVICE_KINDS)}.")
    if kind == "auto":
        found = next(k for k in ("npu", "cuda", "cpu") if count_visible(k))
        if found != "npu":
            host.warn_of_idle_npus()
        return found
    if not count_visible(kind):
        reasons = " ".join(["", *map(str, host.problems())]) if kind == "npu" else ""
        raise ValueError(
            f"device is {kind!r}, but no such device is visible. Set it to 'auto' to use an available one.{reasons}"
        )
    return kind


def count_visible(kind: str, environ: Mapping[str, str] = os.environ) -> int:
    """The number of devices visible with this environment, counted without starting a driver. A CPU counts as one.

    For CUDA, `environ` is ignored, and this process's visible devices are counted.
    """
    if kind == "npu":
        return host.visible_cards(environ)
    return torch.cuda.device_count() if kind == "cuda" else 1


def resolve_ranks(ranks: int, kind: str, environ: Mapping[str, str] = os.environ) -> int:
    """The number of ranks to start; 0 is one per device that `environ` makes visible.

    Raises ValueError for more ranks than devices. A CPU can run any number, which share its cores.
    """
    visible = count_visible(kind, environ)
    if kind != "cpu" and ranks > visible:
        raise ValueError(
            f"ranks is {ranks}, but {visible} {kind} device(s) are visible. "
            "Set ranks to 0 to use all of them, or make more devices visible."
        )
    return ranks or visible


def warn_if_crowded(ranks: int, kind: str) -> None:
    """Warns if a CPU has fewer cores than ranks."""
    usable = cores.usable_cores()
    if kind == "cpu" and ranks > usable:
        logger.warning(
            "ranks is %d, but there are %d CPU core(s), so the ranks will wait for each other. "
            "Set ranks to %d or fewer, or to 0 for one rank.", ranks, usable, usable,
        )  # fmt: skip


def take(kind: str, local_rank: int) -> torch.device:
    """Sets this rank's device as the current one, and returns it."""
    if kind == "cpu":
        return torch.device("cpu")
    if not hasattr(torch, kind):
        raise RuntimeError(
            f"torch has no {kind!r} devices in this process. Is torch_npu installed for this torch, and is "
            "TORCH_DEVICE_BACKEND_AUTOLOAD not 0?"
        )
    if kind == "npu":
        # CANN contains compiled operators; compiling them for each shape would take minutes.
        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.config.allow_internal_format = False  # keeps torch's layouts, for views and collectives
    device = torch.device(kind, local_rank)
    getattr(torch, kind).set_device(device)
    if (line := _line(device)) in host.UNFIT:
        raise ValueError(str(host.unfit(line)))
    return device


# SoC versions: torch_npu 2.13.0, NpuVariables.h. The names are the product lines'.
_LINES = {
    "910": range(100, 105), "310P": range(200, 206), "a2": range(220, 226), "310B": range(240, 244),
    "a3": range(250, 257), "a5": range(260, 261),
}  # fmt: skip


@lru_cache(maxsize=None)
def card(device: torch.device) -> str | None:
    """The product line of an NPU: "a2" (910B), "a3" (910_93), "a5" (950); None for others."""
    line = _line(device)
    return None if line in host.UNFIT else line


def model_name(device: torch.device) -> str:
    """What decides how a device rounds: an NPU's product line, a GPU's name, the instructions that torch uses of a
    CPU."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return card(device) or "unknown" if device.type == "npu" else torch.cuda.get_device_name(device)


def _line(device: torch.device) -> str | None:
    if device.type != "npu":
        return None
    soc = torch.npu.utils.get_soc_version()
    return next((line for line, versions in _LINES.items() if soc in versions), None)


def name(device: torch.device) -> str:
    """The name that a driver has for `device`."""
    return "CPU" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def default_dtype(device: torch.device) -> torch.dtype:
    """The default dtype of diffusion networks: float32 on a CPU, bfloat16 on other devices, as Wan's attention
    overflows in float16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@contextmanager
def internal_formats():
    """Lets casts to an NPU's own formats make tensors in them, which they silently do not otherwise on A2 and A3 cards
    (Ascend/pytorch, torch_npu/csrc/aten/common/TensorFactories.cpp)."""
    torch.npu.config.allow_internal_format = True
    try:
        yield
    finally:
        torch.npu.config.allow_internal_format = False


def synchronise(device: torch.device) -> None:
    """Waits until `device` has finished all queued work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`, without waiting for the device: a copy of memory that is not pinned would wait
    until all queued work is done (torch_npu 2.13, CachingHostAllocator.cpp)."""
    if device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def empty_cache(device: torch.device) -> None:
    """Returns unused memory, pinned host memory included, to the driver, or on a CPU to the kernel.

    torch_npu 2.7.1 and 2.9.0 cannot return pinned memory; from 2.7.1.post8 and 2.9.0.post6 on they can.
    """
    if device.type != "cpu":
        card = getattr(torch, device.type)
        card.empty_cache()
        if hasattr(card, "host_empty_cache"):
            card.host_empty_cache()
        elif device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()
    elif hasattr(LIBC, "malloc_trim"):  # only glibc has it
        LIBC.malloc_trim(0)


def keeps_pinned(device: torch.device) -> bool:
    """Whether torch keeps pinned host memory that is freed, for later tensors: see `empty_cache`."""
    return device.type == "npu" and not hasattr(torch.npu, "host_empty_cache")


def free_memory(device: torch.device) -> int | None:
    """The free memory of `device` in bytes; None for a CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type).mem_get_info(device)[0]


def communicator_bytes(device: torch.device) -> int:
    """The memory of an NPU that each communicator takes outside of torch's allocator; 0 for other devices.

    Two buffers of HCCL_BUFFSIZE MB, 200 by default (hicann/hccl, docs/zh/user_guide/hccl_env/HCCL_BUFFSIZE.md)."""
    return 2 * int(os.environ.get("HCCL_BUFFSIZE", "200")) * 2**20 if device.type == "npu" else 0


def forget_peak(device: torch.device) -> None:
    """Starts a new measurement of `peak_memory`."""
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that torch's allocator has taken from `device` since `forget_peak`; None for a CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type).max_memory_reserved(device)


def host_memory() -> int:
    """The available memory of the host, or of its container, in bytes."""
    return memory.available()


def local_ranks() -> int:
    """The number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def room(device: torch.device) -> int:
    """The memory in bytes that this rank can allocate: free device memory, and unused memory of torch's allocator. On a
    CPU, this rank's part of the host's available memory."""
    if device.type == "cpu":
        return host_memory() // local_ranks()
    card = getattr(torch, device.type)
    return free_memory(device) + card.memory_reserved(device) - card.memory_allocated(device)


class SideStream:
    """A stream for copies that overlap with computation on `device`. On a CPU, copies run immediately."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = None if device.type == "cpu" else getattr(torch, device.type).Stream(device)

    @contextmanager
    def after_now(self):
        """Work queued inside starts after all work that is queued on the device now."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(getattr(torch, self._device.type).current_stream(self._device))
        with getattr(torch, self._device.type).stream(self._stream):
            yield

    def join(self) -> None:
        """Makes later work on the device wait for the copies."""
        if self._stream is not None:
            getattr(torch, self._device.type).current_stream(self._device).wait_stream(self._stream)


@contextmanager
def all_cores():
    """Lets this rank use every core of the process, for work that only one rank does. A user's OMP_NUM_THREADS is
    kept.

    With CPU_AFFINITY_CONF, torch_npu binds a rank's threads to some cores; these bindings are restored afterwards.
    """
    threads, bound = torch.get_num_threads(), _affinities()
    for thread in bound:
        _bind(thread, CORES)
    torch.set_num_threads(int(os.environ.get(cores.ALL_THREADS) or threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for thread in _affinities():  # new threads get the main thread's affinity
            _bind(thread, bound.get(thread, bound[os.getpid()]))


def _affinities() -> dict[int, set[int]]:
    """The CPU affinity of each thread of this process."""
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
