"""Merges LoRAs into the weights of loaded networks, and removes them again, without reading the base model again.

    W = (W0 in fp32 + the LoRAs' changes, in their order) in W's dtype

for the part of W that this rank holds. The original W0 of each changed weight stays in host memory until no LoRA
changes it. A change that depends on more of W0 (DoRA) reads the rest from the model's file once: what it needs to know
of that is kept too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..checkpoints.formats.parts import Slices, full_slices, pieces_of
from ..checkpoints.formats.tensor_files import TensorFile, open_tensors
from ..checkpoints.fused import Target
from ..checkpoints.reader import BytesRead, Places, nbytes, read_part
from ..errors import coded_error
from ..models.family import LoraNames
from ..parallel.fsdp import ShardedWeights, own_part
from ..recognition.lora.files import LoraFile, fingerprint, read_lora
from ..specs import LoraSpec

LorasInUse = list[tuple[LoraFile, float]]  # with their strengths, in the order in which they are added


@dataclass(frozen=True)
class LoraTarget:
    """A network that LoRAs change.

    places: where its parameters lie on disk. names: how LoRA files name its layers. expert: which of two experts it is;
    None: the model has one.
    """

    places: Places
    names: LoraNames
    expert: str | None = None


class Adapter:
    """The LoRAs of one expert's network.

    parameter: gets its current parameter by name. share: the part of each that this rank holds. device: computes the
    merge. files: LoRA files that were read for it. before_change: called before a weight changes.
    """

    def __init__(
        self,
        target: LoraTarget,
        parameter: Callable[[str], Tensor],
        share: ShardedWeights,
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
        self._summaries: dict[Hashable, Tensor] = {}  # see `recognition.lora.dependent`; on the CPU
        self._loras: LorasInUse = []
        self._merged = True  # False: a change was interrupted

    def opened(self, specs: list[LoraSpec]) -> LorasInUse:
        """The LoRAs' files; known files are not read again. Raises ValueError for a file that does not fit."""
        return read_loras(specs, self._target, self._files)

    @property
    def in_use(self) -> bool:
        """Whether any LoRA changes the weights."""
        return bool(self._loras)

    @property
    def warnings(self) -> list[str]:
        """Warnings about the LoRAs in use: layers that are left out, an unknown strength."""
        return [file.warning for file, _ in self._loras if file.warning]

    def to_change(self, loras: LorasInUse) -> list[str]:
        """The parameters that change when these LoRAs replace those in use."""
        return [] if self._in_use(loras) else sorted({*self._originals, *changed_by(loras)})

    def to_keep(self, loras: LorasInUse) -> int:
        """The bytes of the originals that these LoRAs add to this rank's host memory. On a CPU they are there already,
        mostly as a mapped file."""
        if self._device.type == "cpu":
            return 0
        added = changed_by(loras) - self._originals.keys()
        return sum(own_part(self._parameter(name)).nbytes for name in added)

    def use(self, loras: LorasInUse, on_bytes: Callable[[int], None]) -> None:
        """Sets the weights to those of the base model with these LoRAs; does nothing if they are in use.

        Raises ValueError if a file changed meanwhile; the next use then starts over.
        """
        names = self.to_change(loras)
        self._files = tuple(file for file, _ in loras)
        if self._in_use(loras):
            return
        self._before_change()
        self._loras, self._merged = loras, False
        with ExitStack() as stack, torch.no_grad():
            opened = [(lora, stack.enter_context(open_tensors(lora.path)), strength) for lora, strength in loras]
            merging = _Merging(opened, self.places, self._base, self._summaries)
            for name in names:
                if any(name in lora.changes for lora, _ in loras):
                    self._merge(name, merging)
                else:
                    self._restore(name)
                on_bytes(self.places[name].nbytes)
            self._summaries = merging.used
        for file, _ in loras:
            if fingerprint(str(file.path)) != file.fingerprint:
                raise coded_error("AV-1315", f"{file.path} changed while it was read. Run the job again.")
        self._merged = True

    def _in_use(self, loras: LorasInUse) -> bool:
        return self._merged and loras == self._loras

    def _merge(self, name: str, merging: _Merging) -> None:
        if name not in self._originals:
            self._keep(name)
        own_part(self._parameter(name)).copy_(merging.weight(name, self._part(name)))

    def _base(self, name: str, part: Slices) -> Tensor:
        """A part of a parameter of the base model, in fp32; from its file if this rank does not hold all of it."""
        original = self._originals.get(name)
        held = own_part(self._parameter(name)) if original is None else original
        own = self._part(name)
        if all(has.start <= wanted.start and wanted.stop <= has.stop for has, wanted in zip(own, part)):
            held = held[tuple(slice(x.start - has.start, x.stop - has.start) for has, x in zip(own, part))]
        else:
            held = read_part(name, self.places[name], part, held.dtype)
        return held.to(self._device, torch.float32, copy=True)

    def _part(self, name: str) -> Slices:
        shape = self.places[name].shape
        return self._share.part(name, shape) or full_slices(shape)

    def _keep(self, name: str) -> None:
        """On a CPU the original keeps its memory, which may be a mapped file, and the parameter gets new memory. On a
        device, which has no room for both, and under FSDP, which refers to it, the parameter keeps its memory."""
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


@dataclass
class _Merging:
    """LoRAs while they are merged. opened: each with its file and its strength. base: gets a part of a parameter
    without any. known: summaries of earlier merges; used: of this one."""

    opened: list[tuple[LoraFile, TensorFile, float]]
    places: Places
    base: Callable[[str, Slices], Tensor]
    known: dict[Hashable, Tensor]
    used: dict[Hashable, Tensor] = field(default_factory=dict)

    def weight(self, name: str, part: Slices, count: int | None = None) -> Tensor:
        """A part of a parameter with the first `count` LoRAs, in fp32; None: with all."""
        weight, whole = self.base(name, part), self.places[name].shape
        for number, (lora, file, strength) in enumerate(self.opened[:count]):
            change = lora.changes.get(name)
            if change is None or not weight.numel():
                continue
            if change.depends:
                change.apply(weight, self._summary(name, number, part), file, part, whole, strength)
            else:
                change.add_to(weight, file, part, whole, strength)
        return weight

    def _summary(self, name: str, number: int, part: Slices) -> Tensor:
        lora, file, _ = self.opened[number]
        before = tuple((earlier.fingerprint, strength) for earlier, _, strength in self.opened[:number])
        key = name, str(part), lora.fingerprint, before
        made = self.used.get(key, self.known.get(key))
        if made is None:
            change = lora.changes[name]
            layer = partial(self._layer, change.parts, number)
            made = change.summary(layer, file, part, self.places[name].shape).cpu()
        self.used[key] = made
        return made

    def _layer(self, parts: tuple[Target, ...], count: int, lies: Slices) -> Tensor:
        """A part of a layer of a file, which holds these parameters, with the first `count` LoRAs."""
        if len(parts) == 1 and parts[0].rows is parts[0].columns is None:
            return self.weight(parts[0].name, lies, count)
        made = None
        for one in parts:
            for at, part in pieces_of(one, self.places[one.name].shape, lies):
                piece = self.weight(one.name, part, count)
                made = piece.new_empty([own.stop - own.start for own in lies]) if made is None else made
                made[at] = piece
        return made


def use_loras(
    adapters: dict[str, Adapter], specs: tuple[LoraSpec, ...], progress: BytesRead, check: Callable[[int], None]
) -> None:
    """Makes the experts, given by name, use these LoRAs. Raises ValueError, before any weight changes, if a LoRA is for
    an expert that the model lacks, or its file does not fit.

    check: called before any weight changes with the bytes that this rank's host memory gets in addition; may raise.
    """
    requested = by_expert(specs, list(adapters))
    loras = {expert: adapter.opened(requested[expert]) for expert, adapter in adapters.items()}
    to_change = [(adapter.places, adapter.to_change(loras[expert])) for expert, adapter in adapters.items()]
    check(sum(adapter.to_keep(loras[expert]) for expert, adapter in adapters.items()))
    progress.expect(sum(nbytes(*change) for change in to_change))
    for expert, adapter in adapters.items():
        adapter.use(loras[expert], progress.add)


def by_expert(specs: tuple[LoraSpec, ...], experts: list[str]) -> dict[str, list[LoraSpec]]:
    """The LoRAs of each expert. Raises ValueError if one is for an expert that the model lacks."""
    for spec in specs:
        if spec.expert != "both" and len(experts) == 1:
            raise coded_error(
                "AV-1404",
                f"The LoRA {spec.path} is for the expert {spec.expert}, but this model has only one expert. "
                "Set expert to 'both'.",
            )
    return {expert: [spec for spec in specs if spec.expert in ("both", expert)] for expert in experts}


def read_loras(specs: list[LoraSpec], target: LoraTarget, known: Iterable[LoraFile] = ()) -> LorasInUse:
    """LoRAs for a network; `known` files are not read again. Raises ValueError for a file that does not fit."""
    shapes = {name: place.shape for name, place in target.places.items()}
    files = {(file.fingerprint, file.misfits): file for file in known}
    loras = []
    for spec in specs:
        file = files.get((fingerprint(spec.path), spec.misfits)) or read_lora(
            spec.path, shapes, target.names, target.expert, spec.misfits
        )
        if not file.changes and spec.expert != "both" and spec.misfits == "refuse":
            raise coded_error(
                "AV-1404",
                f"The LoRA {spec.path} is set for the expert {spec.expert}, but all its layers are for the other one. "
                "Set expert to 'both', which gives each expert its own layers.",
            )
        loras.append((file, spec.strength))
    return loras


def changed_by(loras: LorasInUse) -> set[str]:
    """The names of the parameters that these LoRAs change."""
    return {name for file, _ in loras for name in file.changes}
