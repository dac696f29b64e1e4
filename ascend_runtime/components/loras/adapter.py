"""Merges LoRAs into the weights of loaded networks, and removes them again, without reading the base model again.

    W = (W0 in fp32 + the LoRAs' changes, in their order) in W's dtype

for the part of W that this rank holds. The original W0 of each changed weight stays in host memory until no LoRA
changes it. A change that depends on more of W0 (DoRA) reads the rest from the model's file once: what it needs to know
of that is kept too. Quantized layers keep their weights, and LoRAs are added to their outputs (terms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from ...checkpoints.formats.parts import Slices, full_slices
from ...checkpoints.opening import open_tensors
from ...checkpoints.reader import BytesRead, nbytes, read_part
from ...errors import coded_error
from ...parallel.fsdp import ShardedWeights, own_part
from ...recognition.lora.files import LoraFile, fingerprint
from ...specs import LoraSpec
from .merging import Merging
from .requests import LorasInUse, LoraTarget, by_expert, merged_by, read_loras
from .terms import QuantizedTerms, no_layers


class Adapter:
    """The LoRAs of one expert's network.

    parameter: gets its current parameter by name. share: the part of each that this rank holds. device: computes the
    merge. files: LoRA files that were read for it. before_change: called before a weight changes. terms: those of the
    network's quantized layers, if it has any.
    """

    def __init__(
        self,
        target: LoraTarget,
        parameter: Callable[[str], Tensor],
        share: ShardedWeights,
        device: torch.device,
        files: Iterable[LoraFile] = (),
        before_change: Callable[[], None] = lambda: None,
        terms: QuantizedTerms | None = None,
    ):
        self.places = target.places
        self._target = target
        self._parameter = parameter
        self._share = share
        self._device = device
        self._before_change = before_change
        self._terms = terms or QuantizedTerms(target, no_layers, share, device)
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
        """The parameters that change when these LoRAs replace those in use, and the weights of quantized layers for
        which files are read."""
        if self._in_use(loras):
            return []
        of_terms = [f"{layer}.weight" for layer in self._terms.to_build(loras)]
        return sorted({*self._originals, *merged_by(loras, self._target), *of_terms})

    def to_keep(self, loras: LorasInUse) -> int:
        """The bytes of the originals that these LoRAs add to this rank's host memory. On a CPU they are there already,
        mostly as a mapped file."""
        if self._device.type == "cpu":
            return 0
        added = merged_by(loras, self._target) - self._originals.keys()
        return sum(own_part(self._parameter(name)).nbytes for name in added)

    @property
    def nbytes(self) -> int:
        """What LoRAs take next to the weights."""
        return self._terms.nbytes

    def move(self, device: torch.device) -> None:
        """Moves what LoRAs take next to the weights to a device."""
        self._terms.move(device)

    def use(self, loras: LorasInUse, on_bytes: Callable[[int], None]) -> None:
        """Sets the weights to those of the base model with these LoRAs; does nothing if they are in use.

        Raises ValueError if a file changed meanwhile; the next use then starts over.
        """
        names = self.to_change(loras)
        self._files = tuple(file for file, _ in loras)
        if self._in_use(loras):
            return
        if not all(map(self._target.is_quantized, names)):
            self._before_change()
        self._loras, self._merged = loras, False
        with ExitStack() as stack, torch.no_grad():
            used = loras if names else []  # a changed strength of quantized layers reads no file
            opened = [(lora, stack.enter_context(open_tensors(lora.path)), strength) for lora, strength in used]
            merging = Merging(opened, self.places, self._base, self._summaries)
            for name in names:
                self._change(name, merging)
                on_bytes(self.places[name].nbytes)
            self._summaries = merging.used
            self._terms.set_strengths(loras)
        for file, _ in loras:
            if fingerprint(str(file.path)) != file.fingerprint:
                raise coded_error("AV-1315", f"{file.path} changed while it was read. Run the job again.")
        self._merged = True

    def _in_use(self, loras: LorasInUse) -> bool:
        return self._merged and loras == self._loras

    def _change(self, name: str, merging: Merging) -> None:
        if self._target.is_quantized(name):
            self._terms.build(name.removesuffix(".weight"), merging.opened)
        elif merging.changes(name):
            self._merge(name, merging)
        else:
            self._restore(name)

    def _merge(self, name: str, merging: Merging) -> None:
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
