"""The only maker of groups of ranks; the mesh of all ranks with the axes cfg x ring x ulysses x tp, whose innermost
neighbours are on one machine; exchanges that several modules use."""

from __future__ import annotations

import faulthandler
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..specs import Plan
from ..specs.plans import AXES, Line, lines_along

# renamed in torch 2.13
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

RENDEZVOUS_SECONDS = 120.0  # in which all ranks must have created a group
FLATTENED = {"sequence": ("ring", "ulysses")}  # axes that some collectives use as one

_groups: dict[tuple[str, Line, bool], dist.ProcessGroup | None] = {}  # None: this rank is not in it


class Mesh:
    """All ranks, arranged along the axes of a plan."""

    def __init__(self, kind: str, plan: Plan):
        self.plan = plan
        axes = {axis: (axis,) for axis in AXES} | FLATTENED
        self._groups = {
            name: group_along(kind, plan.degrees, tuple(map(AXES.index, parts))) for name, parts in axes.items()
        }

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """This rank and those that differ from it only along this axis of AXES or FLATTENED; None if there are none."""
        return self._groups[axis]


@lru_cache(maxsize=None)
def mesh_of(kind: str, plan: Plan) -> Mesh:
    """The mesh of all ranks for this plan. Cached, so that returning to a plan costs nothing."""
    return Mesh(kind, plan)


def group_along(
    kind: str, degrees: tuple[int, ...], dims: tuple[int, ...], background: bool = False
) -> dist.ProcessGroup | None:
    """The group of this rank and those that differ from it only along these dims of a grid of all ranks, for tensors on
    `kind` devices; None if there are none. degrees: the grid's sizes. background, and who must call it: see `group_of`.
    """
    size = math.prod(degrees[dim] for dim in dims)
    return group_of(kind, lines_along(degrees, dims), background) if size > 1 else None


def group_of(kind: str, lines: tuple[Line, ...], background: bool = False) -> dist.ProcessGroup | None:
    """The group of that line that this rank is in, for tensors on `kind` devices; None if it is in none. lines: no rank
    is in two of them. Collective: all ranks must call it, also those in no line.

    Cached: the same ranks have one group, and so one communicator, whose buffers take device memory (see
    `devices.communicator_bytes`).
    background: for exchanges that run while others do. These get a communicator of their own, as a communicator runs
    one exchange after the other.
    """
    keys = [(kind, line, background) for line in lines]
    new = {key: _made(key[1], background) for key in keys if key not in _groups}
    _groups.update(new)
    for group in filter(None, new.values()):
        _connect(group, kind)
    return next(filter(None, map(_groups.get, keys)), None)


def communicators() -> int:
    """The number of communicators on this rank's device."""
    return sum(group is not None for group in _groups.values())


def _made(line: Line, background: bool) -> dist.ProcessGroup | None:
    if len(line) == dist.get_world_size() and not background:
        return dist.group.WORLD
    with _ended_after(RENDEZVOUS_SECONDS):
        group = dist.new_group(line)
    return group if dist.get_rank() in line else None


def _connect(group: dist.ProcessGroup, kind: str) -> None:
    """Makes the group's communicator by a first exchange of all its members.

    HCCL and NCCL make a communicator when a group exchanges for the first time, and wait for all members meanwhile. A
    batch of sends and receives may not be that first exchange if a member takes no part (torch's documentation of
    batch_isend_irecv), and a communicator that is made now finds memory, and is counted in what is free.
    """
    members = torch.ones(1, device=kind)
    dist.all_reduce(members, group=group)
    assert int(members) == dist.get_world_size(group), (int(members), dist.get_process_group_ranks(group))


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Exits this process, with a traceback on standard error, if the code inside takes longer. If no thread can be
    started, torch's group constructor may block forever during its cleanup, and all other ranks with it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # starts a thread; raises if it cannot
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True)
class Member:
    """This rank's place in a group: number `rank` of `degree`."""

    group: dist.ProcessGroup

    @property
    def degree(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size()


def this_rank() -> int:
    """The number of this rank."""
    return dist.get_rank()


def all_reduce_max(value: int) -> int:
    """The maximum of `value` over all ranks, by an all-reduce over the CPU backend (Gloo). All ranks must call it."""
    if dist.get_world_size() == 1:
        return value
    verdict = torch.tensor(int(value))
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
    return int(verdict)


def all_reduce_max_of(values: Tensor) -> Tensor:
    """The maxima over all ranks, elementwise, as `all_reduce_max`, of values [N] on the CPU, of which none is NaN."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_alike(value: object) -> bool:
    """Whether `value` is written (repr) alike on all ranks. All ranks must call it."""
    digest = zlib.crc32(repr(value).encode())
    return all_reduce_max(digest) == -all_reduce_max(-digest)


def gather_bytes(content: bytes) -> list[bytes]:
    """What each rank gives, by all-gathers on the CPU. All ranks must call it."""
    sizes = all_gather(torch.tensor([len(content)]), dist.group.WORLD).flatten().tolist()
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    if content:
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    found = all_gather(padded, dist.group.WORLD)
    return [one.numpy().tobytes()[:size] for one, size in zip(found, sizes)]


def all_reduce_sum(values: Tensor) -> list[float]:
    """The sums of `values` over all ranks, elementwise, by an all-reduce on the CPU. All ranks must call it."""
    values = values.cpu().to(torch.float64, copy=True)
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values.tolist()


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks of `group`, each of x's shape, as [ranks, *x.shape]."""
    gathered, work = start_all_gather(x, group)
    work.wait()
    return gathered


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """(the tensors of all ranks [ranks, *x.shape], valid when the work is done; the work)"""
    gathered = x.new_empty((dist.get_world_size(group), *x.shape))
    work = _all_gather_single(gathered.flatten(0, 1), x.contiguous(), group=group, async_op=True)
    return gathered, work


def pad_end(x: Tensor, dim: int, size: int) -> Tensor:
    """`x`, padded with zeros at the end of `dim` to `size`."""
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
