"""Sums of a weight and the changes that LoRAs make to it, in their order."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ...checkpoints.formats.parts import Slices, pieces_of
from ...checkpoints.formats.tensor_file import TensorFile
from ...checkpoints.fused import Target
from ...checkpoints.reader import Places
from ...recognition.lora.files import LoraFile


@dataclass
class Merging:
    """LoRAs while they are merged. opened: each with its file and its strength. base: gets a part of a parameter
    without any. known: summaries of earlier merges; used: of this one."""

    opened: list[tuple[LoraFile, TensorFile, float]]
    places: Places
    base: Callable[[str, Slices], Tensor]
    known: dict[Hashable, Tensor]
    used: dict[Hashable, Tensor] = field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Whether any of them changes a parameter."""
        return any(name in lora.changes for lora, *_ in self.opened)

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
