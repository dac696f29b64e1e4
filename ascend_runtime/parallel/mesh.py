"""The mesh of all ranks with the axes cfg x ring x ulysses x tp, whose innermost neighbours are on one machine."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..specs import Plan
from ..specs.plans import AXES

# renamed in torch 2.13
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

RENDEZVOUS_SECONDS = 120.0  # in which all ranks must have created a group
FLATTENED = {"sequence": ("ring", "ulysses")}  # axes that some collectives use as one


class Mesh:
    """All ranks, arranged along the axes of a plan."""

    def __init__(self, kind: str, plan: Plan):
        self.plan = plan
        axes = init_device_mesh(kind, plan.degrees, mesh_dim_names=AXES)
        self._axes = {axis: axes[axis] for axis in AXES}
        self._axes |= {name: axes[parts]._flatten(name) for name, parts in FLATTENED.items()}

    def group(self, axis: str) -> dist.ProcessGroup:
        """This rank and those that differ from it only along this axis of AXES or FLATTENED."""
        return self._axes[axis].get_group()


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


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Exits this process, with a traceback on standard error, if the code inside takes longer. If no thread can be
    started, torch's group constructor may block forever during its cleanup, and all other ranks with it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # starts a thread; raises if it cannot
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@lru_cache(maxsize=None)
def mesh_of(kind: str, plan: Plan) -> Mesh:
    """The mesh of all ranks for this plan. Cached, so that returning to a plan costs nothing."""
    with _ended_after(RENDEZVOUS_SECONDS):
        return Mesh(kind, plan)


@lru_cache(maxsize=None)
def weights_mesh(kind: str, tp: int) -> DeviceMesh:
    """The mesh fsdp x tp of all ranks. Ranks along fsdp hold the same slice of the weights, ranks along tp the others.

    Since tp is the innermost axis of every plan, these groups do not depend on the other degrees: plans with the same
    tp degree keep all weights in place.
    """
    with _ended_after(RENDEZVOUS_SECONDS):
        return init_device_mesh(kind, (dist.get_world_size() // tp, tp), mesh_dim_names=("fsdp", "tp"))


def all_reduce_max(value: int) -> int:
    """The maximum of `value` over all ranks, by an all-reduce over the CPU backend (Gloo). All ranks must call it."""
    if dist.get_world_size() == 1:
        return value
    verdict = torch.tensor(int(value))
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
    return int(verdict)


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
