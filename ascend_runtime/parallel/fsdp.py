"""Which part of a network's weights a rank holds: a slice by tensor parallelism, a share of it by FSDP2, or all.

FSDP2 (torch.distributed.fsdp.fully_shard; Zhao et al., arXiv 2304.11277): of each tensor, a rank keeps some rows. A
block is gathered before it computes; afterwards each rank frees what is not its own.
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
from .direct_gather import DirectGather
from .mesh import weights_mesh
from .tensor import TensorParallel, WholeWeights, slice_of


@dataclass(frozen=True)
class Sharding:
    """tp: this rank's slice. mesh: of the ranks that share that slice, or None where each holds all of it."""

    tp: WholeWeights | TensorParallel = WholeWeights()
    mesh: DeviceMesh | None = None


@lru_cache(maxsize=None)
def sharding_of(kind: str, world_size: int, tp: int, fsdp: bool) -> Sharding:
    """How weights are spread over `world_size` ranks on `kind` devices. Every rank must ask: they form groups."""
    shared = fsdp and tp < world_size
    if tp == 1 and not shared:
        return Sharding()
    mesh = weights_mesh(kind, tp)
    return Sharding(
        TensorParallel(mesh["tp"].get_group()) if tp > 1 else WholeWeights(), mesh["fsdp"] if shared else None
    )


@dataclass(frozen=True)
class Share:
    """What a rank holds of each parameter of one network; `checkpoints.reader.load_weights` asks.

    cut_dim: the dim along which tensor parallelism cuts a parameter, by name; None: it does not.
    replicated: whether every rank keeps a parameter whole under FSDP too, by name: the small ones of another dtype
        than their block, since FSDP2 gathers one dtype at a time.
    units: the modules that are gathered at once, in the order in which they begin; what is in none of them is gathered
        for the whole forward, and what is in a unit within another with the inner one. Each gathers the next one's
        weights while it computes.

    Holds, of R ranks: 1/R of the weights, two units at most (one within another counts with it), what is in none, and
    what is replicated.
    Sends, a rank and a forward: its share, R-1 times.
    """

    sharding: Sharding
    cut_dim: Callable[[str], int | None]
    replicated: Callable[[str], bool]
    units: list[nn.Module]

    def prepare(self, network: nn.Module) -> None:
        """Gives the parameters of `network`, on the meta device, the shapes that are held here."""
        for name, parameter in list(network.named_parameters()):
            if (dim := self._cut(name)) is not None:
                own = slice_of(parameter.shape[dim], self.sharding.tp)
                assign(network, name, parameter.narrow(dim, own.start, own.stop - own.start).contiguous())
        if self.sharding.mesh is not None:
            self._shard(network)

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """Which part of a parameter of this whole shape is held here; None: all of it."""
        part = [slice(0, size) for size in shape]
        if (dim := self._cut(name)) is not None:
            part[dim] = slice_of(shape[dim], self.sharding.tp)
        if self._shared(name):
            part[0] = _rows(part[0], self.sharding.mesh)
        return tuple(part) if part != [slice(0, size) for size in shape] else None

    def parameter(self, network: nn.Module, name: str, part: Tensor) -> Tensor:
        """The parameter to be set, of the part that was read."""
        if not self._shared(name):
            return part
        like = network.get_parameter(name)
        assert part.shape == like.to_local().shape, (name, part.shape, like.to_local().shape)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _cut(self, name: str) -> int | None:
        return self.cut_dim(name) if self.sharding.tp.degree > 1 else None

    def _shared(self, name: str) -> bool:
        return self.sharding.mesh is not None and not self.replicated(name)

    def _shard(self, network: nn.Module) -> None:
        whole = {parameter for name, parameter in network.named_parameters() if self.replicated(name)}
        for module in (*reversed(self.units), network):  # what is within must come before what it is within
            self._fully_shard(module, whole)
            if self.sharding.mesh.device_type == "cpu" and hasattr(module, "set_custom_all_gather"):  # of torch 2.8
                module.set_custom_all_gather(DirectGather())
        # The first unit too: what a module gathers on its own FSDP2 keeps until the next one's weights are in place.
        for unit, following in zip((network, *self.units), self.units):
            # not set_modules_to_forward_prefetch: it keeps the gathered bytes of a third unit for longer
            unit.register_forward_pre_hook(lambda *_, following=following: _gather_ahead(following))
        network.register_forward_hook(lambda *_: _forget_forward([*self.units, network]), always_call=True)

    def _fully_shard(self, module: nn.Module, whole: set[nn.Parameter]) -> None:
        """Raises ValueError where torch is too old for weights in 8 bits (pytorch/pytorch#177844)."""
        try:
            fully_shard(module, mesh=self.sharding.mesh, reshard_after_forward=True, ignored_params=whole)
        except RuntimeError as error:
            if "can require gradients" not in str(error):
                raise
            raise ValueError(
                f"fsdp of torch {torch.__version__} shares no weights in 8 bits. Take torch 2.13, or leave fsdp off, "
                "or set quantization to 'none' with the model's float files."
            ) from error


def own_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, between two forwards: in the same memory, to be written into."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _rows(rows: slice, mesh: DeviceMesh) -> slice:
    """Those of `rows` that FSDP2 keeps on this rank: chunks of equal size, the last ones shorter or empty."""
    size = -(-(rows.stop - rows.start) // mesh.size())
    start = min(rows.start + mesh.get_local_rank() * size, rows.stop)
    return slice(start, min(start + size, rows.stop))


def _gather_ahead(unit: FSDPModule) -> None:
    unit.unshard(async_op=True)


def _forget_forward(modules: list[FSDPModule]) -> None:
    """FSDP2 notes each forward until a backward, which never comes here; and keeps what one that was broken off, such
    as by a cancel, has gathered."""
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        if group is None:  # of a network whose parameters are all in its units
            continue
        group.wait_for_unshard()
        module.reshard()
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()
