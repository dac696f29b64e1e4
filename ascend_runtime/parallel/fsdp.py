"""Shards a network's weights over ranks: slices by tensor parallelism, shards of these by FSDP2, or neither.

FSDP2 (torch.distributed.fsdp.fully_shard; Zhao et al., arXiv 2304.11277): each rank keeps some rows of each tensor. A
block's weights are gathered before it computes; afterwards each rank frees the other ranks' shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..checkpoints.reader import assign
from ..errors import coded_error
from .direct_gather import DirectGather
from .mesh import group_along
from .rows import own_rows
from .tensor import TensorParallel, WholeWeights, slice_of

INTEGERS_SINCE = (2, 13)  # the torch version whose FSDP shards weights in 8 bits


@dataclass(frozen=True)
class Sharding:
    """tp: this rank's slice. mesh: the ranks over which that slice is sharded; None: no FSDP."""

    tp: WholeWeights | TensorParallel = WholeWeights()
    mesh: DeviceMesh | None = None


@lru_cache(maxsize=None)
def sharding_of(kind: str, world_size: int, tp: int, fsdp: bool) -> Sharding:
    """How weights are sharded over `world_size` ranks on `kind` devices. Collective: all ranks must call it.

    The ranks form the grid fsdp x tp: ranks along fsdp hold the same slice of the weights, ranks along tp the others.
    Since tp is the innermost axis of every plan, these groups do not depend on the other degrees: plans with the same
    tp degree keep all weights in place. FSDP gathers weights while blocks compute and exchange, so in the background.
    """
    degrees = world_size // tp, tp
    slices = group_along(kind, degrees, (1,))
    shards = group_along(kind, degrees, (0,), background=True) if fsdp else None
    return Sharding(
        WholeWeights() if slices is None else TensorParallel(slices),
        None if shards is None else DeviceMesh.from_group(shards, kind),
    )


@dataclass(frozen=True)
class ShardedWeights:
    """The part of each parameter that a rank holds (see `checkpoints.reader.LocalWeights`).

    cut_dim: the dim along which tensor parallelism cuts a parameter, by name; None: it does not. A dim of one element
        belongs to all slices.
    replicated: whether every rank keeps a parameter whole under FSDP, by name: small ones whose dtype differs from
    their block's, since FSDP2 gathers one dtype at a time.
    units: the modules whose weights are gathered together, in the order of their first use. Weights outside of units
        are gathered for the whole forward; weights in nested units belong to the inner one. Each unit prefetches the
        next one's weights while it computes.

    Memory per rank, with R ranks: 1/R of the weights, at most two whole units (a nested one counts with its outer one),
    the weights outside of units, and those that are replicated.
    Communication per rank and forward: sends its shard R-1 times.
    """

    sharding: Sharding
    cut_dim: Callable[[str], int | None]
    replicated: Callable[[str], bool]
    units: list[nn.Module]

    def prepare(self, network: nn.Module) -> None:
        """Gives the parameters of `network`, on the meta device, the shapes that this rank holds."""
        for name, parameter in list(network.named_parameters()):
            if (dim := self._cut(name, parameter.shape)) is not None:
                own = slice_of(parameter.shape[dim], self.sharding.tp)
                assign(network, name, parameter.narrow(dim, own.start, own.stop - own.start).contiguous())
        if self.sharding.mesh is not None:
            self._shard(network)

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """The part of a parameter of this full shape that this rank holds; None: all of it."""
        part = [*self.slice_of(name, shape)]
        if self._is_sharded(name):
            part[0] = _rows(part[0], self.sharding.mesh)
        return tuple(part) if part != [slice(0, size) for size in shape] else None

    def slice_of(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The slice of a parameter of this full shape that tensor parallelism gives to this rank."""
        part = [slice(0, size) for size in shape]
        if (dim := self._cut(name, shape)) is not None:
            part[dim] = slice_of(shape[dim], self.sharding.tp)
        return tuple(part)

    def parameter(self, network: nn.Module, name: str, part: Tensor) -> Tensor:
        """The parameter to set, from the part that was read."""
        if not self._is_sharded(name):
            return part
        like = network.get_parameter(name)
        assert part.shape == like.to_local().shape, (name, part.shape, like.to_local().shape)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _cut(self, name: str, shape: tuple[int, ...]) -> int | None:
        dim = self.cut_dim(name) if self.sharding.tp.degree > 1 else None
        return None if dim is None or shape[dim] == 1 else dim

    def _is_sharded(self, name: str) -> bool:
        return self.sharding.mesh is not None and not self.replicated(name)

    def _shard(self, network: nn.Module) -> None:
        whole = {parameter for name, parameter in network.named_parameters() if self.replicated(name)}
        for module in (*reversed(self.units), network):  # inner modules must come before outer ones
            self._fully_shard(module, whole)
            if self.sharding.mesh.device_type == "cpu" and hasattr(module, "set_custom_all_gather"):  # since torch 2.8
                module.set_custom_all_gather(DirectGather())
        # Also the first unit: FSDP2 keeps weights that were gathered without prefetching until the next unit's arrive.
        for unit, following in zip((network, *self.units), self.units):
            # not set_modules_to_forward_prefetch, which keeps the gathered weights of a third unit for longer
            unit.register_forward_pre_hook(lambda *_, following=following: _gather_ahead(following))
        network.register_forward_hook(lambda *_: _reset_forward([*self.units, network]), always_call=True)

    def _fully_shard(self, module: nn.Module, whole: set[nn.Parameter]) -> None:
        """Raises ValueError if this torch version cannot shard 8-bit weights (pytorch/pytorch#177844)."""
        try:
            fully_shard(module, mesh=self.sharding.mesh, reshard_after_forward=True, ignored_params=whole)
        except RuntimeError as error:
            if "can require gradients" not in str(error):
                raise
            raise coded_error(
                "AV-1415",
                f"fsdp of torch {torch.__version__} cannot shard 8-bit weights. Use torch 2.13, or turn fsdp off, or "
                "set quantization to 'none' with the model's floating-point files.",
            ) from error


def shards_no_integers() -> bool:
    """Whether FSDP of this torch version cannot shard weights in 8 bits (pytorch/pytorch#177844)."""
    return tuple(map(int, torch.__version__.split(".")[:2])) < INTEGERS_SINCE


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP shards this network."""
    return isinstance(network, FSDPModule)


def own_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds between forwards, as a view that may be written to."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _rows(rows: slice, mesh: DeviceMesh) -> slice:
    """The rows that FSDP2 keeps on this rank, of these."""
    own = own_rows(rows.stop - rows.start, mesh.size(), mesh.get_local_rank())
    return slice(rows.start + own.start, rows.start + own.stop)


def _gather_ahead(unit: FSDPModule) -> None:
    unit.unshard(async_op=True)


def _reset_forward(modules: list[FSDPModule]) -> None:
    """Resets FSDP2's state after a forward: it records each forward for a backward, which never follows here, and keeps
    what an interrupted forward has gathered."""
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        if group is None:  # of a network whose parameters are all in its units
            continue
        group.wait_for_unshard()
        module.reshard()
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()
