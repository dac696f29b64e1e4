"""Weights that stay in the blocks of their files, and are dequantized a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...ops.blocks.ggml import BLOCK_TYPES, BlockType
from ..formats.tensor_file import TensorFile
from ..msmodelslim import Layer


@dataclass(frozen=True)
class PackedWeights:
    """Which layers are kept in blocks; see msmodelslim.Description, in whose place it is used.

    file: the first that has some. layers: the type of each layer's blocks, by the network's names.
    """

    file: Path
    layers: dict[str, str]

    @property
    def algorithms(self) -> list[str]:
        """The types of blocks, each once."""
        return sorted(set(self.layers.values()))

    def renamed(self, parameters: Callable[[str], Iterable[str]]) -> dict[str, Layer]:
        """The layers by the network's names."""
        return {name: Layer(kind) for name, kind in self.layers.items()}

    def parts_in(self, file: TensorFile) -> dict[str, bool]:
        """Blocks have no further tensors."""
        return {}

    def packing(self, key: str, name: str) -> BlockType | None:
        """How the values of a parameter are kept as bytes; None: as numbers."""
        return BLOCK_TYPES.get(self.layers.get(name.removesuffix(".weight"), "")) if name.endswith(".weight") else None
