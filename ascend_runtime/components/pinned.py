"""Pinned host memory for the weights of experts that take turns: laid out (see planner.holding.slabs), counted and
checked before it is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import coded_error
from ..hardware import devices, memory
from ..planner.holding.slabs import slabs_of

Weights = dict[str, dict[str, Tensor]]  # by expert and by name


class _Slabs:
    """The bytes of the slabs of this process: now, and at most."""

    def __init__(self):
        self.now = self.most = 0

    def made(self, size: int, device: torch.device) -> Tensor:
        slab = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(slab.untyped_storage(), self._freed, size)
        return slab

    def _freed(self, size: int) -> None:
        self.now -= size


_slabs = _Slabs()


@dataclass(frozen=True)
class Layout:
    """sizes: of the slabs, in bytes. places: (the slab, the first byte in it) of each tensor of `weights`, which are on
    the meta device."""

    weights: Weights
    sizes: list[int]
    places: dict[tuple[str, str], tuple[int, int]]

    @classmethod
    def of(cls, weights: Weights) -> Layout:
        """See planner.holding.slabs."""
        sizes = {(expert, name): x.nbytes for expert, tensors in weights.items() for name, x in tensors.items()}
        return cls(weights, *slabs_of(sizes))

    @property
    def nbytes(self) -> int:
        """Of the slabs."""
        return sum(self.sizes)

    @property
    def exact(self) -> int:
        """The bytes of the tensors."""
        return sum(x.nbytes for tensors in self.weights.values() for x in tensors.values())

    @property
    def quantized(self) -> bool:
        return any(not x.dtype.is_floating_point for tensors in self.weights.values() for x in tensors.values())

    def allocated(self, device: torch.device) -> Weights:
        """Uninitialised tensors on the host that `device` can read while it computes."""
        made = {key: tensor for slab in self.slabs(device) for key, tensor in slab.items()}
        return {expert: {name: made[expert, name] for name in tensors} for expert, tensors in self.weights.items()}

    def slabs(self, device: torch.device) -> Iterator[dict[tuple[str, str], Tensor]]:
        """The same tensors, by expert and name, slab by slab; each is allocated when it is asked for."""
        for number, size in enumerate(self.sizes):
            slab = _slabs.made(size, device)
            yield {
                (expert, name): self._part(slab, first, self.weights[expert][name])
                for (expert, name), (which, first) in self.places.items()
                if which == number
            }

    @staticmethod
    def _part(slab: Tensor, first: int, like: Tensor) -> Tensor:
        return slab[first : first + like.nbytes].view(like.dtype).view(like.shape)


def kept_by_torch(device: torch.device) -> int:
    """The bytes of pinned memory that this process's earlier layouts left with torch, and another can use."""
    return _slabs.most - _slabs.now if devices.keeps_pinned(device) else 0


def require_room(layout: Layout, originals: int, host_memory: int, ranks: int | None = None) -> None:
    """Raises ValueError, which says what would fit, if the host has too little memory for all its ranks.

    originals: the bytes of a rank's weights that LoRAs change, which it keeps as well. host_memory, ranks: of
    `HostMemory`; ranks None: those of this host.
    """
    ranks, each = ranks or devices.local_ranks(), layout.nbytes + originals
    free = max(0, host_memory - memory.ROOM)
    if ranks * each <= free:
        return
    kept = f" and {originals / 1e9:.1f} GB for the original weights that LoRAs change" if originals else ""
    raise coded_error(
        "AV-1203",
        f"The two experts would take turns on the device, and wait in pinned host memory: {layout.exact / 1e9:.1f} GB "
        f"for each of {ranks} rank(s), {layout.nbytes / 1e9:.1f} GB as it is allocated{kept}, "
        f"{ranks * each / 1e9:.1f} GB together. The host has {host_memory / 1e9:.1f} GB available, of which "
        f"{memory.ROOM / 1e9:.1f} GB must stay free. "
        f"What helps: {'; '.join(_cures(layout, ranks, free // each))}.",
    )


def require_room_for_originals(nbytes: int, host_memory: int, ranks: int | None = None) -> None:
    """Raises ValueError if the host has too little memory for the original weights that LoRAs will change, this many
    bytes on each of its ranks. host_memory, ranks: as for `require_room`."""
    ranks = ranks or devices.local_ranks()
    if ranks * nbytes <= max(0, host_memory - memory.ROOM):
        return
    raise coded_error(
        "AV-1204",
        f"The LoRAs change weights whose originals wait in host memory: {nbytes / 1e9:.1f} GB for each of {ranks} "
        f"rank(s), {ranks * nbytes / 1e9:.1f} GB together. The host has {host_memory / 1e9:.1f} GB available, of which "
        f"{memory.ROOM / 1e9:.1f} GB must stay free. What helps: turn fsdp on, so that each rank keeps its shard only; "
        "use fewer ranks; or merge the LoRAs into the model's files, and load these.",
    )


def _cures(layout: Layout, ranks: int, fitting: int) -> Iterator[str]:
    """What a user can change. fitting: the number of ranks that the host has memory for."""
    if ranks > 1:
        yield "turn fsdp on, so that ranks share the weights on their devices and nothing waits on the host"
    if fitting:
        yield f"use at most {fitting} rank(s)"
    if not layout.quantized:
        yield "set quantization to 'w8a8_dynamic', which takes about half"
    yield "where both experts fit on a device, set experts of DiffusionModelSpec to 'resident' in Python"
