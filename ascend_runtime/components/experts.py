"""Two experts on a device that has room for one: the idle one waits in pinned host memory.

Weights change between jobs alone, so the host keeps those of both, and the device's one set of tensors is written over,
part by part, in the last pass through the network before the other expert's first: each block as soon as it has
computed, while the next one computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hardware import devices

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"


@dataclass
class _Part:
    """Tensors of the network that change at once, and whose they are now."""

    tensors: dict[str, Tensor]
    holder: str | None


@dataclass(frozen=True)
class HostWeights:
    """An expert's weights on the host. parameter: one by name. before_change: to be called before one is written."""

    parameter: Callable[[str], Tensor]
    before_change: Callable[[], None]


class ExpertSwap:
    """network: on `device`, with the weights of the high-noise expert. idle: the low-noise one's, on the host, by name.

    fetched: parts that were written so far.
    """

    def __init__(self, network: nn.Module, units: list[nn.Module], idle: dict[str, Tensor], device: torch.device):
        tensors = {name: parameter.data for name, parameter in network.named_parameters()}
        self._host = {
            HIGH_NOISE: {name: _on_host(tensor, device) for name, tensor in tensors.items()},
            LOW_NOISE: {name: _on_host(tensor, device) for name, tensor in idle.items()},
        }
        self._device = device
        self._copies = devices.SideStream(device)
        self._ahead: str | None = None
        self.fetched = 0
        names = {module: name + "." for name, module in network.named_modules()}
        self._parts = {unit: _Part({}, HIGH_NOISE) for unit in (*units, network)}
        for name, tensor in tensors.items():
            owners = [unit for unit in units if name.startswith(names[unit])]
            owner = max(owners, key=lambda unit: len(names[unit]), default=network)  # of units in units the inner one
            self._parts[owner].tensors[name] = tensor
        for unit in self._parts:  # the network's own last: it is called when all units have computed
            unit.register_forward_hook(lambda module, *_: self._after(module))

    def use(self, expert: str) -> None:
        """Makes the network that expert; at once, if it was fetched ahead."""
        self._ahead = None
        for part in self._parts.values():
            self._fetch(part, expert)
        self._copies.join()

    def fetch_ahead(self, expert: str) -> None:
        """Has the next pass through the network leave it as that expert."""
        self._ahead = expert

    def expert(self, name: str) -> HostWeights:
        """An expert's weights, which may be written into."""
        return HostWeights(self._host[name].__getitem__, self._outdate)

    def _outdate(self) -> None:
        """Has whatever is used next fetched from the host, from which no copy is under way when this returns."""
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
        part.holder = expert
        self.fetched += 1


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the device can read while it computes."""
    copy = tensor.detach().to("cpu", copy=True)
    return copy if device.type == "cpu" else copy.pin_memory()
