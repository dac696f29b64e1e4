"""Merges LoRAs into the weights of loaded networks, and removes them again, without reading the base model again.

    W = (W0 in fp32 + the sum of the LoRAs' changes) in W's dtype

for the part of W that this rank holds. The original W0 of each changed weight stays in host memory until no LoRA
changes it. Quantized layers keep their weights, and LoRAs are added to their outputs (terms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from ...checkpoints.formats.parts import full_slices
from ...checkpoints.formats.tensor_files import TensorFile, open_tensors
from ...checkpoints.reader import BytesRead, nbytes
from ...errors import coded_error
from ...parallel.fsdp import ShardedWeights, own_part
from ...recognition.lora.changes import WeightChange
from ...recognition.lora.files import LoraFile, fingerprint
from ...specs import LoraSpec
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
            for name in names:
                self._change(name, opened)
                on_bytes(self.places[name].nbytes)
            self._terms.set_strengths(loras)
        for file, _ in loras:
            if fingerprint(str(file.path)) != file.fingerprint:
                raise coded_error("AV-1315", f"{file.path} changed while it was read. Run the job again.")
        self._merged = True

    def _in_use(self, loras: LorasInUse) -> bool:
        return self._merged and loras == self._loras

    def _change(self, name: str, opened: list[tuple[LoraFile, TensorFile, float]]) -> None:
        if self._target.is_quantized(name):
            self._terms.build(name.removesuffix(".weight"), opened)
        elif changes := [(file.changes[name], *rest) for file, *rest in opened if name in file.changes]:
            self._merge(name, changes)
        else:
            self._restore(name)

    def _merge(self, name: str, changes: list[tuple[WeightChange, TensorFile, float]]) -> None:
        if name not in self._originals:
            self._keep(name)
        shape = self.places[name].shape
        part = self._share.part(name, shape) or full_slices(shape)
        weight = self._originals[name].to(self._device, torch.float32, copy=True)
        for change, file, strength in changes:
            change.add_to(weight, file, part, shape, strength)
        own_part(self._parameter(name)).copy_(weight)

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
