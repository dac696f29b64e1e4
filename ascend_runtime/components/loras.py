"""LoRAs in the weights of loaded networks: merged, changed, taken out again, without a byte of the base being read.

    W = (W0 in fp32 + the sum of what LoRAs add) in W's dtype

of the part of W that this rank holds. W0, of what LoRAs touch, stays in host memory while they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.formats.parts import whole
from ..checkpoints.formats.tensor_files import TensorFile, open_tensors
from ..checkpoints.reader import Places, ReadProgress, nbytes
from ..models.family import LoraNames
from ..parallel.fsdp import Share, own_part
from ..recognition.lora import Difference, LoraFile, LowRank, fingerprint, read_lora
from ..specs import LoraSpec

LorasInUse = list[tuple[LoraFile, float]]  # with their strengths, in the order in which they are added


@dataclass(frozen=True)
class LoraTarget:
    """A network that LoRAs change.

    places: of its parameters on disk. names: those that files have for its layers. expert: which of two it is; None: it
    is the only one.
    """

    places: Places
    names: LoraNames
    expert: str | None = None


class Adapter:
    """The LoRAs of one network, an expert.

    parameter: one of its parameters by name, as it is now. share: what is held of each here. device: computes what is
    merged. files: LoRAs that were read for it. before_change: called before a weight changes.
    """

    def __init__(
        self,
        target: LoraTarget,
        parameter: Callable[[str], Tensor],
        share: Share,
        device: torch.device,
        files: Iterable[LoraFile] = (),
        before_change: Callable[[], None] = lambda: None,
    ):
        self.places = target.places
        self._target = target
        self._parameter = parameter
        self._share = share
        self._device = device
        self._before_change = before_change
        self._files = tuple(files)
        self._originals: dict[str, Tensor] = {}  # this rank's parts, as they were read
        self._loras: LorasInUse = []
        self._merged = True  # False: a change was broken off

    def opened(self, specs: list[LoraSpec]) -> LorasInUse:
        """The LoRAs' files; those that were read are not read again. Raises ValueError for one that does not fit."""
        return read_loras(specs, self._target, self._files)

    @property
    def warnings(self) -> list[str]:
        """What is to be said of the LoRAs in use: layers that are left out, a strength that is not known."""
        return [file.warning for file, _ in self._loras if file.warning]

    def to_change(self, loras: LorasInUse) -> list[str]:
        """The parameters that change where these LoRAs take the place of those in use."""
        return [] if self._in_use(loras) else sorted({*self._originals, *changed_by(loras)})

    def use(self, loras: LorasInUse, on_bytes: Callable[[int], None]) -> None:
        """Makes the weights those of the base with these LoRAs; does nothing if they are.

        Raises ValueError where a file changed meanwhile: the next use begins anew.
        """
        names = self.to_change(loras)
        self._files = tuple(file for file, _ in loras)
        if self._in_use(loras):
            return
        self._before_change()
        self._loras, self._merged = loras, False
        with ExitStack() as stack, torch.no_grad():
            opened = [(lora, stack.enter_context(open_tensors(lora.path)), strength) for lora, strength in loras]
            for name in names:
                changes = [(file.changes[name], *rest) for file, *rest in opened if name in file.changes]
                if changes:
                    self._merge(name, changes)
                else:
                    self._restore(name)
                on_bytes(self.places[name].nbytes)
        for file, _ in loras:
            if fingerprint(str(file.path)) != file.fingerprint:
                raise ValueError(f"{file.path} changed while it was read. Run again.")
        self._merged = True

    def _in_use(self, loras: LorasInUse) -> bool:
        return self._merged and loras == self._loras

    def _merge(self, name: str, changes: list[tuple[LowRank | Difference, TensorFile, float]]) -> None:
        if name not in self._originals:
            self._keep(name)
        shape = self.places[name].shape
        part = self._share.part(name, shape) or whole(shape)
        weight = self._originals[name].to(self._device, torch.float32, copy=True)
        for change, file, strength in changes:
            change.add_to(weight, file, part, shape, strength)
        own_part(self._parameter(name)).copy_(weight)

    def _keep(self, name: str) -> None:
        """On a CPU the original stays as it lies, perhaps in the mapped file, and the parameter gets other memory.
        Else the parameter keeps its memory: FSDP has what is sharded by other names too, a device has no room."""
        parameter = self._parameter(name)
        if self._may_move(parameter):
            self._originals[name], parameter.data = parameter.data, torch.empty_like(parameter.data)
        else:
            self._originals[name] = own_part(parameter).to("cpu", copy=True)

    def _restore(self, name: str) -> None:
        parameter = self._parameter(name)
        if self._may_move(parameter):
            parameter.data = self._originals[name]
        else:
            own_part(parameter).copy_(self._originals[name])
        del self._originals[name]

    def _may_move(self, parameter: Tensor) -> bool:
        return self._device.type == "cpu" and own_part(parameter) is parameter


def use_loras(adapters: dict[str, Adapter], specs: tuple[LoraSpec, ...], progress: ReadProgress) -> None:
    """Brings the experts, by name, to these LoRAs. Raises ValueError, before any weight changes, where one is for an
    expert that there is not, or its file does not fit."""
    asked = by_expert(specs, list(adapters))
    loras = {expert: adapter.opened(asked[expert]) for expert, adapter in adapters.items()}
    to_change = [(adapter.places, adapter.to_change(loras[expert])) for expert, adapter in adapters.items()]
    progress.expect(sum(nbytes(*change) for change in to_change))
    for expert, adapter in adapters.items():
        adapter.use(loras[expert], progress.add)


def by_expert(specs: tuple[LoraSpec, ...], experts: list[str]) -> dict[str, list[LoraSpec]]:
    """Which LoRAs each expert gets. Raises ValueError where one is for an expert that there is not."""
    for spec in specs:
        if spec.expert != "both" and len(experts) == 1:
            raise ValueError(
                f"The LoRA {spec.path} is for the expert {spec.expert}, but this model has no two experts. "
                "Set expert to 'both'."
            )
    return {expert: [spec for spec in specs if spec.expert in ("both", expert)] for expert in experts}


def read_loras(specs: list[LoraSpec], target: LoraTarget, known: Iterable[LoraFile] = ()) -> LorasInUse:
    """LoRAs for a network; those that are `known` are not read again. Raises ValueError for one that does not fit."""
    shapes = {name: place.shape for name, place in target.places.items()}
    files = {file.fingerprint: file for file in known}
    loras = []
    for spec in specs:
        file = files.get(fingerprint(spec.path)) or read_lora(spec.path, shapes, target.names, target.expert)
        if not file.changes and spec.expert != "both":
            raise ValueError(
                f"The LoRA {spec.path} is for the expert {spec.expert}, but all its layers are for the other one. Set "
                "expert to 'both', which gives each expert its own."
            )
        loras.append((file, spec.strength))
    return loras


def changed_by(loras: LorasInUse) -> set[str]:
    """The names of the parameters that they touch."""
    return {name for file, _ in loras for name in file.changes}
