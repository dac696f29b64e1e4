"""The diffusion models that a rank holds: the one in use, and the one that was used before it, which waits.

It waits on the device if there is room for both, else in the host's memory, if that has room for it on all ranks; else
it is dropped. A model that comes back is moved, and no file is read. On a CPU nothing moves.

Ranks need not agree on where a model waits: moving takes no communication.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoints.reader import assign
from ..hardware import devices
from ..models.shared.quantized.replacing import prefer_layouts
from ..parallel.fsdp import Sharding, is_sharded, own_part
from ..specs import DiffusionModelSpec
from .diffusion_model import DiffusionModel
from .pinned import Layout, kept_by_torch
from .room import ROOM_TO_COMPUTE, HostMemory

logger = logging.getLogger(__name__)

ROOM_FOR_OTHERS = 32 * 2**30  # bytes of a device for another network of which nothing is predicted

DROPPED = "The host has too little memory for a second diffusion model: the one used before is dropped."


class ModelKey(NamedTuple):
    """Identifies the weights of a model. spec: without LoRAs. state: of its files."""

    spec: DiffusionModelSpec
    sharding: Sharding
    state: Hashable

    def outdated_by(self, other: ModelKey) -> bool:
        return self.spec == other.spec and self.state != other.state


class Needs(NamedTuple):
    """Bytes that a model takes of this rank's device: its weights, and its job besides them."""

    weights: int
    computing: int


@dataclass
class HeldModel:
    """taken: the bytes that it took of this rank's device when it was read; on a CPU, without what is mapped from
    files.
    away: whether the weights left the device for the host."""

    key: ModelKey
    model: DiffusionModel
    taken: int = 0
    away: bool = False

    @property
    def nbytes(self) -> int:
        """On this rank's device, while the model is in use."""
        return self._weights + self.model.lora_bytes

    @property
    def to_host(self) -> int:
        """What the host takes when the model leaves the device. Experts in turns are there already."""
        return self._waiting_in + self.model.lora_bytes

    @property
    def on_host(self) -> int:
        """What the host holds."""
        return (self.model.swap.host_bytes if self.model.swap else 0) + (self.to_host if self.away else 0)

    @cached_property
    def _weights(self) -> int:
        return sum(own_part(weight).nbytes for network in _networks(self.model) for weight in network.parameters())

    @cached_property
    def _waiting_in(self) -> int:
        return 0 if self.model.swap else _waiting_in(self.model)


class DiffusionModels:
    """in_use, waiting: the two models, or None."""

    def __init__(self, device: torch.device):
        self._device = device
        self.in_use: HeldModel | None = None
        self.waiting: HeldModel | None = None

    @property
    def on_host(self) -> tuple[int, int, int]:
        """The bytes that the model in use holds on the host, and the one that waits, and those of pinned memory that
        torch keeps for later models."""
        in_use, waiting = (0 if held is None else held.on_host for held in (self.in_use, self.waiting))
        return in_use, waiting, kept_by_torch(self._device)

    @property
    def makes_room(self) -> int:
        """The bytes of this rank's device that the two models would give back."""
        return self._bytes(self.in_use) + self.waiting_bytes

    @property
    def waiting_bytes(self) -> int:
        """The bytes of this rank's device that the model that waits takes."""
        return self._bytes(self.waiting)

    def _bytes(self, held: HeldModel | None) -> int:
        if held is None or held.away:
            return 0
        return held.taken if self._device.type == "cpu" else held.nbytes

    def holds(self, spec: DiffusionModelSpec, tp_degree: int, sharded: bool) -> bool:
        """Whether the weights of this model, without LoRAs, are here, whole or as slices and shards of these kinds."""
        keys = [one.key for one in (self.in_use, self.waiting) if one is not None]
        return any(
            (key.spec, key.sharding.tp.degree, key.sharding.mesh is not None) == (spec, tp_degree, sharded)
            for key in keys
        )

    def use(self, key: ModelKey, host: HostMemory, computing: int = ROOM_TO_COMPUTE) -> DiffusionModel | None:
        """The model of this key, which is the one in use from now on; None if it is not held. computing: the bytes of
        the device that its job takes besides its weights."""
        if self.in_use is None or self.in_use.key != key:
            if self.waiting is None or self.waiting.key != key:
                return None
            self._exchange(host, computing)
        return self.in_use.model

    def drop_outdated(self, key: ModelKey, host: HostMemory) -> None:
        """Frees a model of the same spec and of files that have changed since."""
        if self.waiting is not None and self.waiting.key.outdated_by(key):
            self.drop_waiting(host)
        if self.in_use is not None and self.in_use.key.outdated_by(key):
            self.in_use = None
            self._collect()
            host.free, host.in_use = host.free + host.in_use, 0

    def make_room(self, nbytes: int, host: HostMemory, computing: int = ROOM_TO_COMPUTE) -> None:
        """Before another model is loaded: the one in use waits, in the place of the one that waited, which is dropped.

        nbytes: what it takes on this rank's device; on a CPU, without what is mapped from files. computing: see `use`.
        """
        if self.in_use is not None:
            self.drop_waiting(host)
        elif self.waiting is not None and not self.waiting.away:
            self.in_use, self.waiting = self.waiting, None
            host.in_use, host.waiting = host.waiting, 0
        for _ in self._set_aside(Needs(nbytes, computing), host):
            pass

    @property
    def waits_on_device(self) -> bool:
        """Whether a model waits in the place of what other networks could need."""
        return self.waiting is not None and not self.waiting.away and self._device.type != "cpu"

    def clear_for(self, computing: int, host: HostMemory) -> None:
        """Moves the model that waits from the device, or drops it, if the job of the one in use needs its place."""
        if self._device.type != "cpu":
            self.leave_device(host, computing)
        elif devices.room(self._device) < computing:
            self.give_way(host)

    def leave_device(self, host: HostMemory, needed: int = ROOM_FOR_OTHERS) -> None:
        """Moves the model that waits from the device to the host, or drops it, if other networks could need its
        place. needed: the bytes that they take."""
        held = self.waiting
        if not self.waits_on_device or devices.room(self._device) >= needed:
            return
        if not host.has(held.to_host, _pinned_for(held, host)):
            self.give_way(host)
            return
        for _ in self._leaving(held, host):
            pass

    def give_way(self, host: HostMemory) -> None:
        """Drops the model that waits, if there is one, as its place is needed."""
        if self.waiting is not None:
            logger.info(DROPPED)
        self.drop_waiting(host)

    def drop_waiting(self, host: HostMemory) -> None:
        """Frees the model that waits, if there is one."""
        if self.waiting is not None:
            self.waiting = None
            self._collect()
            host.free, host.waiting = host.free + host.waiting, 0

    def drop(self) -> None:
        """Frees both models."""
        self.in_use = self.waiting = None
        self._collect()

    def _exchange(self, host: HostMemory, computing: int) -> None:
        """The two models change places: slab by slab where they are in slabs, so that the host never holds both."""
        comes, self.waiting = self.waiting, None
        on_host, released = host.waiting, 0 if comes.model.swap or not comes.away else host.waiting
        host.waiting = 0
        try:
            leaving = self._set_aside(Needs(comes.nbytes if comes.away else 0, computing), host, released)
            returning = _to_device(comes.model) if comes.away else iter(())
            in_slabs = not (comes.model.swap or is_sharded(comes.model.high_noise))
            for _ in zip_longest(leaving, returning) if in_slabs else chain(leaving, returning):
                pass
        except BaseException:
            self.drop()  # their weights are partly here and partly there
            raise
        host.free, host.in_use = host.free + released, on_host - released
        comes.away, self.in_use = False, comes

    def _set_aside(self, needs: Needs, host: HostMemory, released: int = 0) -> Iterator[None]:
        """The model in use becomes the one that waits, or is dropped, so that the device has room for another.
        The steps of its move; released: bytes that the host gets back meanwhile."""
        held, self.in_use = self.in_use, None
        if held is None:
            return iter(())
        in_use, host.in_use = host.in_use, 0
        if self._fits(needs, host):
            self.waiting, host.waiting = held, in_use
            return iter(())
        if self._device.type != "cpu" and host.has(held.to_host, released + _pinned_for(held, host)):
            self.waiting, host.waiting = held, in_use
            return self._leaving(held, host)
        del held
        host.free += in_use
        logger.info(DROPPED)
        self._collect()
        return iter(())

    def _fits(self, needs: Needs, host: HostMemory) -> bool:
        if self._device.type == "cpu":
            return host.has(needs.weights)
        return devices.room(self._device) >= needs.weights + needs.computing

    def _leaving(self, held: HeldModel, host: HostMemory) -> Iterator[None]:
        taken = host.ranks * held.to_host
        host.free, host.waiting = host.free - taken, host.waiting + taken
        held.away = True
        return _to_host(held.model, self._device)

    def _collect(self) -> None:
        gc.collect()
        devices.empty_cache(self._device)


def _networks(model: DiffusionModel) -> list[nn.Module]:
    """Two experts that take turns are one network."""
    return list(dict.fromkeys(model.experts))


def _layout(model: DiffusionModel) -> Layout:
    return Layout.of({
        str(number): {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                      for name, weight in network.named_parameters()}
        for number, network in enumerate(_networks(model))
    })  # fmt: skip


def _waiting_in(model: DiffusionModel) -> int:
    """The bytes of host memory in which the weights wait."""
    if is_sharded(model.high_noise):
        return sum(own_part(weight).nbytes for network in _networks(model) for weight in network.parameters())
    return _layout(model).nbytes


def _to_host(model: DiffusionModel, device: torch.device) -> Iterator[None]:
    """Moves the weights to pinned host memory, slab by slab; shards, which FSDP refers to, by torch's own way."""
    networks = _networks(model)
    for adapter in model.adapters.values():
        adapter.move(torch.device("cpu"))
    if model.swap is not None:
        model.swap.leave()
    elif is_sharded(model.high_noise):
        for network in networks:
            yield network.to("cpu")
    else:
        for slab in _layout(model).slabs(device):
            for (number, name), place in slab.items():
                network = networks[int(number)]
                assign(network, name, place.copy_(network.get_parameter(name)))
            yield


def _to_device(model: DiffusionModel) -> Iterator[None]:
    """Moves the weights back. A slab is free as soon as its weights have left."""
    networks = _networks(model)
    for adapter in model.adapters.values():
        adapter.move(model.device)
    if model.swap is not None:
        model.swap.come_back()
    elif is_sharded(model.high_noise):
        for network in networks:
            yield network.to(model.device)
    else:
        for slab in _by_slab(networks):
            for network, name in slab:
                assign(network, name, network.get_parameter(name).to(model.device, non_blocking=True))
            devices.synchronise(model.device)
            yield
        for network in networks:
            prefer_layouts(network)


def _by_slab(networks: list[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """The parameters in each slab, by network and name."""
    slabs = defaultdict(list)
    for network in networks:
        for name, weight in network.named_parameters():
            slabs[weight.untyped_storage().data_ptr()].append((network, name))
    return list(slabs.values())


def _pinned_for(held: HeldModel, host: HostMemory) -> int:
    """The pinned memory kept by torch that this model can wait in."""
    return 0 if is_sharded(held.model.high_noise) else host.pinned
