"""Weights as integers of 8 or 4 bits with a scale for the tensor or for each row, whose inputs may be rotated.

The layouts are those of ComfyUI 0.33.0 (comfy/ops.py) and comfy-kitchen: int8_tensorwise, convrot_w4a4 and
asym_w4a8_int8. A rotated weight is the original's, with each group of inputs multiplied by a matrix
(ops/blocks/rotation.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import coded_error
from ...ops.packing import int4_values
from ...ops.quantization import INT8_MAX
from ...ops.blocks.rotation import rotated
from ..formats.parts import Slices
from .scales import checked, of_rows, part_of_groups, whole_scale

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile

LEVEL_COUNT, MIDDLE = 16, 8  # of 4 bits; the level of 0 without a codebook


@dataclass(frozen=True)
class Integers:
    """See coding.Coding. Integers times a scale. scale: its name; one number, [N] or [N, 1] for a weight [N, K].
    rotation: the size of the rotated groups of inputs; 0: none. packed: whether they have 4 bits and lie in pairs, the
    first in the lower half of a byte, in a tensor [N, K / 2]."""

    scale: str
    rotation: int = 0
    packed: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.scale,)

    @property
    def grain(self) -> int:
        return math.lcm(self.rotation or 1, 2 if self.packed else 1)

    @property
    def bits(self) -> float:
        return 4 if self.packed else 8

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        return rotated(self.integers(file, key, part).float() * of_rows(file, self.scale, part[0]), self.rotation)

    def integers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        """The integers in a part, before they are scaled and rotated back, as int8."""
        if not self.packed:
            return file.read(key, part)
        return int4_values(file.read(key, halved(part)).view(torch.int8))


@dataclass(frozen=True)
class Levels(Integers):
    """Integers of 8 bits that are made of 4 bits: a level, times the scale of its group of inputs, rounded. A scale of
    each row makes them numbers. levels: the name of the 16 levels; None: -8 to 7. groups: the name of the groups'
    scales [N, K / size]. size: of a group."""

    levels: str | None = None
    groups: str = ""
    size: int = 16

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.scale, self.groups, *filter(None, (self.levels,)))

    @property
    def grain(self) -> int:
        return math.lcm(self.rotation or 1, self.size, 2)

    @property
    def bits(self) -> float:
        return 4 + 8 / self.size

    def integers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        held = file.read(key, halved(part)).view(torch.uint8)
        places = torch.stack((held & 0xF, held >> 4), -1).flatten(-2).long()
        own = part_of_groups(part, self.size)
        scales = checked(as_e4m3(file.read(self.groups, own)).float(), file, self.groups, zero=True)
        made = self._levels(file)[places].unflatten(-1, (-1, self.size)) * scales.unsqueeze(-1)
        return made.flatten(-2).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)

    def _levels(self, file: TensorFile) -> Tensor:
        if self.levels is None:
            return torch.arange(LEVEL_COUNT, dtype=torch.float32) - MIDDLE
        made = whole_scale(file, self.levels)
        if made.isfinite().all():
            return made
        what = f"{file.path} has NaN or infinite values in {self.levels}"
        raise coded_error("AV-1317", f"{what}. The file is damaged: download it again.")


@dataclass(frozen=True)
class KeptIntegers:
    """The coding of the integers only, for a layer that computes with them: its numbers are integers. of: the weight's
    own coding."""

    of: Integers

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in self.of.keys if key != self.of.scale)

    @property
    def grain(self) -> int:
        return self.of.grain

    @property
    def bits(self) -> float:
        return self.of.bits

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        return self.of.integers(file, key, part).float()


@dataclass(frozen=True)
class RowScales:
    """The coding of the scales [N, 1] of a weight's rows, which may be stored as [N], or as one number for all."""

    keys, grain, bits = (), 1, 32

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        return of_rows(file, key, part[0]).expand(part[0].stop - part[0].start, 1)


def halved(part: Slices) -> Slices:
    """The bytes that hold a part in 4 bits, whose columns begin and end with pairs."""
    rows, columns = part
    return rows, slice(columns.start // 2, columns.stop // 2)


def as_e4m3(tensor: Tensor) -> Tensor:
    """Scales in fp8, which some files hold as bytes."""
    return tensor.view(torch.float8_e4m3fn) if tensor.dtype == torch.uint8 else tensor
