"""Weights in fp8 with scales: a number is its 8-bit value times a scale, one of the tensor or one of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..formats.parts import Slices
from .scales import of_rows

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile


@dataclass(frozen=True)
class Scaled:
    """See coding.Coding. scale: the scale's name; [N, 1, ...] for a weight [N, ...], or one number."""

    scale: str
    grain, bits = 1, 8

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.scale,)

    def numbers(self, file: TensorFile, key: str, part: Slices) -> torch.Tensor:
        scales = of_rows(file, self.scale, part[0] if part else slice(0, 1))
        return file.read(key, part).float() * scales.view(-1, *(1 for _ in part[1:]))


def is_8_bits(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
