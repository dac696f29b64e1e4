"""The ranks as a mesh with named axes, cfg x ring x ulysses x tp, the innermost neighbours on one machine."""

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

# torch 2.13 renamed it
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

MEETING = 120.0  # seconds in which all ranks make a group
FLATTENED = {"sequence": ("ring", "ulysses")}  # axes that some exchange sees as one


class Mesh:
    """All ranks along the axes of a plan."""

    def __init__(self, kind: str, plan: Plan):
        self.plan = plan
        axes = init_device_mesh(kind, plan.degrees, mesh_dim_names=AXES)
        self._axes = {axis: axes[axis] for axis in AXES}
        self._axes |= {name: axes[parts]._flatten(name) for name, parts in FLATTENED.items()}

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along an axis of AXES or FLATTENED alone, itself among them."""
        return self._axes[axis].get_group()


@dataclass(frozen=True)
class Member:
    """What this rank is in a group of ranks that share something: one of `degree`, number `rank`."""

    group: dist.ProcessGroup

    @property
    def degree(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends this rank, with its stack on standard error, if what is inside takes longer. Where no thread can be started,
    torch's constructor of a group can wait for ever while it cleans up, and all other ranks with it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # a thread of its own, which raises as it starts
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@lru_cache(maxsize=None)
def mesh_of(kind: str, plan: Plan) -> Mesh:
    """The mesh of all ranks for this plan; made once, so that a changed plan costs nothing the second time."""
    with _ended_after(MEETING):
        return Mesh(kind, plan)


@lru_cache(maxsize=None)
def weights_mesh(kind: str, tp: int) -> DeviceMesh:
    """The mesh fsdp x tp of all ranks: those that hold the same slice of the weights, and those that hold its others.

    Because tp is the innermost axis of any plan, these are the same ranks whatever the other degrees: another plan
    with as many slices leaves all weights where they are.
    """
    with _ended_after(MEETING):
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
    """What will hold the tensors of all ranks [ranks, *x.shape] once the work is done."""
    gathered = x.new_empty((dist.get_world_size(group), *x.shape))
    work = _all_gather_single(gathered.flatten(0, 1), x.contiguous(), group=group, async_op=True)
    return gathered, work


def pad_end(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with zeros after its end along `dim`, up to `size`."""
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
