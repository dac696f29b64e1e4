"""The device of a rank: which there are, how to take one, and the backends that join them."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
KINDS = ("auto", "npu", "cuda", "cpu")


def resolve_kind(kind: str) -> str:
    """The kind of device meant by `kind`: "auto" takes NPUs, then CUDA devices, then the CPU."""
    if kind not in KINDS:
        raise ValueError(f"device is {kind!r}; it can be one of {', '.join(KINDS)}.")
    if kind == "auto":
        return next(k for k in ("npu", "cuda", "cpu") if count_visible(k))
    if not count_visible(kind):
        raise ValueError(f"device is {kind!r}, but no such device is visible. Set it to 'auto' to take what there is.")
    return kind


def count_visible(kind: str) -> int:
    """Visible devices of one kind, counted without starting a driver; a CPU counts as one."""
    if kind == "cpu":
        return 1
    if kind == "cuda":
        return torch.cuda.device_count()
    if find_spec("torch_npu") is None:
        return 0
    chosen = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if chosen is not None:
        return len([card for card in chosen.split(",") if card.strip()])
    return sum(1 for node in Path("/dev").glob("davinci[0-9]*"))


def resolve_ranks(ranks: int, kind: str) -> int:
    """How many ranks to start when `ranks` are asked for: 0 means one a visible device.

    Raises ValueError for more ranks than accelerators. On a CPU any number runs; they share its cores.
    """
    visible = count_visible(kind)
    if kind != "cpu" and ranks > visible:
        raise ValueError(
            f"{ranks} ranks were asked for, but {visible} {kind} device(s) are visible. "
            "Set ranks to 0 to use what there is, or make more devices visible."
        )
    return ranks or visible


def warn_if_crowded(ranks: int, kind: str) -> None:
    """Says so where more ranks than cores are to compute on a CPU."""
    cores = len(os.sched_getaffinity(0))
    if kind == "cpu" and ranks > cores:
        logger.warning(
            "%d ranks were asked for, but there are %d CPU core(s): the ranks will wait for each other. "
            "Set ranks to %d or fewer, or to 0 for one.", ranks, cores, cores,
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
    device = torch.device(kind, local_rank)
    getattr(torch, kind).set_device(device)
    return device


def synchronise(device: torch.device) -> None:
    """Waits until `device` has done what was queued on it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Gives unused device memory back to the driver."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


@contextmanager
def all_cores():
    """Lets this rank compute on every core of the process's affinity: for work that no other rank shares."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
