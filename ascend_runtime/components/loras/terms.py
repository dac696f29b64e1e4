"""LoRAs of quantized layers: what each adds next to the product of a layer, whose weight stays as it is.

Each rank holds what belongs to its slice of a layer. FSDP does not shard it: every rank keeps it whole, as it is small.
A changed strength reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...checkpoints.formats.parts import Slices
from ...checkpoints.formats.tensor_file import TensorFile
from ...checkpoints.opening import open_tensors
from ...models.shapes import Shapes
from ...models.shared.quantized.lora import BiasChange, LayerChange, KroneckerChange, LoraTerm, PairChange, WholeChange
from ...parallel.fsdp import ShardedWeights
from ...recognition.lora.changes import Kronecker, WeightChange
from ...recognition.lora.files import LoraFile
from .requests import LorasInUse, LoraTarget

FP32 = 4  # bytes of an element
WHOLE, PAIR, KRONECKER = "whole", "pair", "kronecker"


@dataclass
class QuantizedTerms:
    """The terms of an expert's quantized layers.

    place: gives a layer of this name its term; None: it has none. share: the part of each weight that this rank holds.
    dtype: of the blocks.
    """

    target: LoraTarget
    place: Callable[[str, LoraTerm | None], None]
    share: ShardedWeights
    device: torch.device
    dtype: torch.dtype = torch.float32
    _terms: dict[str, LoraTerm] = field(default_factory=dict)
    _made_of: dict[str, tuple] = field(default_factory=dict)  # the fingerprints of the files, by layer

    def to_build(self, loras: LorasInUse) -> list[str]:
        """The layers whose terms these LoRAs change, but for their strengths."""
        layers = {*self._terms, *layers_of(loras, self.target)}
        return sorted(layer for layer in layers if self._files(layer, loras) != self._made_of.get(layer, ()))

    def build(self, layer: str, opened: list[tuple[LoraFile, TensorFile, float]]) -> None:
        """Makes the layer's term of the LoRAs in their open files; removes it if they do not change the layer."""
        own = [(lora, file) for lora, file, _ in opened if self._changes(layer, lora)]
        if own:
            self._terms[layer] = LoraTerm([*self._parts(layer, own)])
            self._made_of[layer] = tuple(lora.fingerprint for lora, _ in own)
        else:
            self._terms.pop(layer, None), self._made_of.pop(layer, None)
        self.place(layer, self._terms.get(layer))

    def set_strengths(self, loras: LorasInUse) -> None:
        """Sets the strengths of all terms, which were made of these LoRAs."""
        for layer, term in self._terms.items():
            term.set_strengths([strength for lora, strength in loras if self._changes(layer, lora)])

    def move(self, device: torch.device) -> None:
        for term in self._terms.values():
            term.move(device)

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self._terms.values())

    def _files(self, layer: str, loras: LorasInUse) -> tuple:
        return tuple(lora.fingerprint for lora, _ in loras if self._changes(layer, lora))

    @staticmethod
    def _changes(layer: str, lora: LoraFile) -> bool:
        return f"{layer}.weight" in lora.changes or f"{layer}.bias" in lora.changes

    def _parts(self, layer: str, own: list[tuple[LoraFile, TensorFile]]) -> Iterator[LayerChange]:
        for number, (lora, file) in enumerate(own):
            for name in (f"{layer}.weight", f"{layer}.bias"):
                change = lora.changes.get(name)
                if change is not None and not change.changes_nothing:
                    yield self._part(number, name, change, file)

    def _part(self, number: int, name: str, change: WeightChange, file: TensorFile) -> LayerChange:
        """The slice of a change of the parameter `name` that belongs to this rank."""
        shape, like = self.target.shapes[name], torch.empty(0, device=self.device)
        part = self.share.slice_of(name, shape)
        if name.endswith(".bias"):
            return BiasChange(lora=number, scale=1.0, bias=_added(change, file, part, shape, like))
        form, _ = smallest(change, file.shapes, part)
        if form == PAIR:
            up, down = (x.to(self.dtype) for x in change.factors(file, part, shape, like))
            return PairChange(lora=number, scale=change.scale, up=up, down=down)
        if form == KRONECKER:
            left, right = (x.to(self.dtype) for x in change.matrices(file, change.cut(file.shapes, part), like))
            return KroneckerChange(lora=number, scale=change.scale, left=left, right=right)
        return WholeChange(lora=number, scale=1.0, matrix=_added(change, file, part, shape, like).to(self.dtype))


def no_layers(layer: str, term: LoraTerm | None) -> None:
    """Of a network without quantized layers."""
    raise AssertionError(layer)


def layers_of(loras: LorasInUse, target: LoraTarget) -> set[str]:
    """The quantized layers that these LoRAs change."""
    return {layer for lora, _ in loras for name in lora.changes if (layer := name.rpartition(".")[0]) in target.layers}


def nbytes_of(loras: LorasInUse, target: LoraTarget, share: ShardedWeights, dtype: torch.dtype) -> int:
    """The bytes that the terms of these LoRAs take of a rank's device. Reads the headers of the files."""
    total, biases = 0, {}
    for lora, _ in loras:
        own = {name: change for name, change in lora.changes.items()
               if target.is_quantized(name) and not change.changes_nothing}  # fmt: skip
        with open_tensors(lora.path) as file:
            for name, change in own.items():
                part = share.slice_of(name, target.shapes[name])
                if name.endswith(".bias"):
                    biases[name] = FP32 * math.prod(_sizes(part))  # the sum, next to each LoRA's
                    total += biases[name]
                else:
                    form, numbers = smallest(change, file.shapes, part)
                    total += dtype.itemsize * numbers + (FP32 * change.rank(file.shapes) if form == PAIR else 0)
    return total + sum(biases.values())


def smallest(change: WeightChange, on_disk: Shapes, part: Slices) -> tuple[str, int]:
    """(the form in which the slices `part` of a change of a matrix take the fewest numbers, these numbers)"""
    rows, columns = _sizes(part)
    forms = {WHOLE: rows * columns}
    if (rank := change.rank(on_disk)) is not None:
        forms[PAIR] = rank * (rows + columns)
    if isinstance(change, Kronecker) and (cut := change.cut(on_disk, part)) is not None:
        forms[KRONECKER] = sum(math.prod(_sizes(one)) for one in cut)
    form = min(forms, key=forms.get)
    return form, forms[form]


def _sizes(part: Slices) -> tuple[int, ...]:
    return tuple(own.stop - own.start for own in part)


def _added(change: WeightChange, file: TensorFile, part: Slices, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """What a change adds to this part of a parameter of this shape, with its scale, in fp32."""
    made = torch.zeros(_sizes(part), dtype=torch.float32, device=like.device)
    change.add_to(made, file, part, shape, 1.0)
    return made
