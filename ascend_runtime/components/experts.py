"""Swaps two experts on a device that has room for one: the idle expert waits in pinned host memory.

Weights change only between jobs, so the host keeps the weights of both experts, and the device keeps one set of
tensors. The last pass before the other expert's first step overwrites them: each block as soon as it has computed,
while the next block computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..checkpoints.reader import assign
from ..hardware import devices
from ..models.shared.quantized.base import QuantizedLinear
from ..models.shared.quantized.lora import LoraTerm
from .pinned import Weights

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"


@dataclass
class _Part:
    """Tensors of the network that are copied together (None: they left the device), the quantized layers among its
    modules, and the expert whose weights they hold now."""

    tensors: dict[str, Tensor | None]
    layers: dict[str, QuantizedLinear]
    holder: str | None


@dataclass(frozen=True)
class HostWeights:
    """An expert's weights on the host. parameter: gets one by name. before_change: must be called before a write.
    place: gives a quantized layer its term by LoRAs, which stays on the device."""

    parameter: Callable[[str], Tensor]
    before_change: Callable[[], None]
    place: Callable[[str, LoraTerm | None], None]


class ExpertSwap:
    """network: on `device`, with the high-noise expert's weights. host: both experts' weights on the host.

    Ranks need not agree on whether experts take turns: it takes no communication.

    fetched: the number of parts that were copied to the device so far.
    """

    def __init__(self, network: nn.Module, units: list[nn.Module], host: Weights, device: torch.device):
        tensors = {name: parameter.data for name, parameter in network.named_parameters()}
        self._network = network
        self._host = host
        self._device = device
        self._copies = devices.SideStream(device)
        self._ahead: str | None = None
        self.fetched = 0
        self._terms: dict[str, dict[str, LoraTerm]] = {expert: {} for expert in host}
        names = {module: name + "." for name, module in network.named_modules()}
        self._parts = {unit: _Part({}, {}, HIGH_NOISE) for unit in (*units, network)}

        def part_of(name: str) -> _Part:
            owners = [unit for unit in units if name.startswith(names[unit])]
            owner = max(owners, key=lambda unit: len(names[unit]), default=network)  # the innermost of nested units
            return self._parts[owner]

        for name, tensor in tensors.items():
            part_of(name).tensors[name] = tensor
        for name, module in network.named_modules():
            if isinstance(module, QuantizedLinear):
                part_of(name).layers[name] = module
        for unit in self._parts:  # the network's own hook is last: it runs when all units have computed
            unit.register_forward_hook(lambda module, *_: self._after(module))

    def use(self, expert: str) -> None:
        """Makes the network this expert; immediate if the expert was prefetched."""
        self._ahead = None
        for part in self._parts.values():
            self._fetch(part, expert)
        self._copies.join()

    def fetch_ahead(self, expert: str) -> None:
        """Makes the next pass through the network leave this expert's weights in it."""
        self._ahead = expert

    @property
    def host_bytes(self) -> int:
        """The bytes of both experts on the host, as they are allocated."""
        slabs = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                 for tensors in self._host.values() for x in tensors.values()}  # fmt: skip
        return sum(slabs.values())

    def expert(self, name: str) -> HostWeights:
        """The writable weights of an expert on the host."""
        return HostWeights(self._host[name].__getitem__, self._outdate, partial(self._place, name))

    def leave(self) -> None:
        """Frees the device's tensors: until `come_back`, the network's parameters are those of an expert on the
        host."""
        self._outdate()
        self._ahead = None
        for part in self._parts.values():
            for name in part.tensors:
                assign(self._network, name, self._host[HIGH_NOISE][name])
            part.tensors = dict.fromkeys(part.tensors)

    def come_back(self) -> None:
        """Makes the network one on the device again."""
        for part in self._parts.values():
            for name in part.tensors:
                part.tensors[name] = self._host[HIGH_NOISE][name].to(self._device, copy=True)
                assign(self._network, name, part.tensors[name])
            self._hold(part, HIGH_NOISE)

    def _outdate(self) -> None:
        """Marks all parts as outdated, so that the next use copies them again. Waits for copies from the host first."""
        self._copies.join()
        devices.synchronise(self._device)
        for part in self._parts.values():
            part.holder = None

    def _after(self, module: nn.Module) -> None:
        if self._ahead is not None:
            self._fetch(self._parts[module], self._ahead)

    def _fetch(self, part: _Part, expert: str) -> None:
        if part.holder == expert:
            return
        with self._copies.after_now(), torch.no_grad():
            for name, tensor in part.tensors.items():
                tensor.copy_(self._host[expert][name], non_blocking=True)
        self._hold(part, expert)
        self.fetched += 1

    def _hold(self, part: _Part, expert: str) -> None:
        part.holder = expert
        for name, layer in part.layers.items():
            layer.lora = self._terms[expert].get(name)

    def _place(self, expert: str, name: str, term: LoraTerm | None) -> None:
        if term is None:
            self._terms[expert].pop(name, None)
        else:
            self._terms[expert][name] = term
        for part in self._parts.values():
            if part.holder == expert and name in part.layers:
                part.layers[name].lora = term
