"""Weights that stay in the few bits of ComfyUI's formats, for layers that compute products of them.

Integers become int8 with one scale for each row, whatever their number of bits; mxfp8 stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...ops.packing import FP8_BITS, Packing
from ..formats.tensor_file import TensorFile
from ..msmodelslim import DYNAMIC, MXFP8, Layer
from .coding import Coding, Codings
from .integers import Integers, KeptIntegers, RowScales
from .layouts import INT8_FORMAT, INTEGER_FORMATS, MX_FORMAT, SCALE_LEAF, rotation_of, row_scale_leaf
from .marks import FULL_PRECISION, FormatMark
from .microscaled import Exponents


@dataclass(frozen=True)
class KeptWeights:
    """Which layers are kept in few bits; see msmodelslim.Description, in whose place it is used.

    file: the first that has some. layers: by the network's names. marks: of their tensors, by the layers' names in the
    files.
    """

    file: Path
    layers: dict[str, Layer]
    marks: dict[str, FormatMark]

    @property
    def algorithms(self) -> list[str]:
        """The layers' algorithms, each once."""
        return sorted({layer.algorithm for layer in self.layers.values()})

    def renamed(self, parameters: Callable[[str], Iterable[str]]) -> dict[str, Layer]:
        """The layers by the network's names."""
        return self.layers

    def parts_in(self, file: TensorFile) -> dict[str, bool]:
        """The tensors of these layers in a file, all of which are used; their biases are like others."""
        return {key: True for key in (*self._weights, *self._scales) if key in file.shapes}

    def packing(self, key: str, name: str) -> Packing | None:
        """How the values of a tensor are kept as bytes; None: as numbers."""
        mark = self._weights.get(key)
        return FP8_BITS if mark and mark.format == MX_FORMAT else None

    def coded(self, codings: Codings) -> Codings:
        """How the tensors of a file are read, of which these layers' are kept."""
        weights: dict[str, Coding] = {
            key: coding for key, coding in codings.weights.items() if key not in self._weights
        }  # fmt: skip
        for key, mark in self._weights.items():
            coding = codings.weights.get(key)
            if isinstance(coding, Integers) and mark.format != INT8_FORMAT:
                weights[key] = KeptIntegers(coding)
        weights |= {key: RowScales() if mark.format in INTEGER_FORMATS else Exponents()
                    for key, mark in self._scales.items()}  # fmt: skip
        renamed = {key: f"{key.rpartition('.')[0]}.{SCALE_LEAF}" for key in self._scales}
        return Codings(weights, codings.others - self._scales.keys(), renamed)

    @property
    def _weights(self) -> dict[str, FormatMark]:
        return {f"{layer}.weight": mark for layer, mark in self.marks.items()}

    @property
    def _scales(self) -> dict[str, FormatMark]:
        return {f"{layer}.{row_scale_leaf(mark)}": mark for layer, mark in self.marks.items()}


def layer_of(mark: FormatMark) -> Layer | None:
    """The layer that computes products of a weight with this mark; None: there is none, or its mark rules it out."""
    if mark.setting(FULL_PRECISION, False):
        return None
    if mark.format in INTEGER_FORMATS:
        return Layer(DYNAMIC, rotation=rotation_of(mark))
    return Layer(MXFP8) if mark.format == MX_FORMAT else None
