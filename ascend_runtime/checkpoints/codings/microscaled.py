"""Weights in fp8 or fp4 with a scale for each group of neighbours: mxfp8 and nvfp4, as ComfyUI 0.33.0 and comfy-kitchen
store them.

    mxfp8   e4m3 [N, K]; exponents of 2 plus 127 of groups of 32
    nvfp4   e2m1 in pairs [N, K / 2], the first in the upper half of a byte; e4m3 scales of groups of 16, times one fp32
            scale of the tensor

The scales of groups lie in blocks (scales.of_blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import coded_error
from ...ops.mxfp8 import MX_GROUP, mx_dequantized
from ..formats.parts import Slices
from .integers import halved
from .scales import E8M0_NAN, checked, in_groups, of_blocks, part_of_groups, whole_scale

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile

NV_GROUP = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, by its three lower bits
E2M1 = torch.tensor([*_MAGNITUDES, *(-one for one in _MAGNITUDES)])


@dataclass(frozen=True)
class MxWeight:
    """See coding.Coding. mxfp8. exponents: their name."""

    exponents: str
    grain, bits = MX_GROUP, 8 + 8 / MX_GROUP

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.exponents,)

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        exponents = _exponents(file, self.exponents, *part_of_groups(part, MX_GROUP))
        return mx_dequantized(file.read(key, part), exponents)


@dataclass(frozen=True)
class Exponents:
    """The coding of the exponents [N, groups] of an mxfp8 weight, for a layer that computes with them: its numbers are
    the exponents."""

    keys, grain, bits = (), 1, 8

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        return _exponents(file, key, *part).float()


@dataclass(frozen=True)
class NvWeight:
    """See coding.Coding. nvfp4. blocks: the name of the groups' scales. scale: that of the tensor's. inputs: that of
    factors of the inputs [K], by which the weight was divided; None: there are none."""

    blocks: str
    scale: str
    inputs: str | None = None
    grain, bits = NV_GROUP, 4 + 8 / NV_GROUP

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.blocks, self.scale, *filter(None, (self.inputs,)))

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        held = file.read(key, halved(part)).view(torch.uint8)
        values = E2M1[torch.stack((held >> 4, held & 0xF), -1).flatten(-2).long()]
        groups = of_blocks(file, self.blocks, *part_of_groups(part, NV_GROUP)).view(torch.float8_e4m3fn).float()
        scales = checked(groups, file, self.blocks, zero=True)
        scales = scales * checked(whole_scale(file, self.scale), file, self.scale)
        made = in_groups(values, scales)
        return made if self.inputs is None else made * file.read(self.inputs, part[1:]).float()


def _exponents(file: TensorFile, name: str, rows: slice, groups: slice) -> Tensor:
    """The exponents of some groups, as bytes. Raises ValueError for one that stands for NaN."""
    exponents = of_blocks(file, name, rows, groups)
    if (exponents == E8M0_NAN).any():
        raise coded_error("AV-1408", f"{file.path} has the scale nan in {name}. Download it again.")
    return exponents
