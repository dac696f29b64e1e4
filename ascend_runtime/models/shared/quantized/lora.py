"""What LoRAs add to the output of a quantized layer, whose weight they leave as it is.

    y = product(x) + sum of  strength * scale * x (change)^T  + change of the bias

computed in the dtype of the blocks, of the input before it is quantized. The change of each LoRA is kept in its
smallest form: B A for a low-rank pair, kron(C1, C2), or the whole matrix.

Tensor parallelism cuts a change as it cuts the layer's weight; the bias of a row-parallel layer is added to the sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class LayerChange(ABC):
    """The change that one LoRA makes to a layer. lora: its number among those that change the layer; scale: of the
    change, without the strength."""

    lora: int
    scale: float


@dataclass(kw_only=True)
class PairChange(LayerChange):
    """B [out, rank] times A [rank, in]."""

    up: Tensor
    down: Tensor


@dataclass(kw_only=True)
class BiasChange(LayerChange):
    """bias [out]"""

    bias: Tensor


@dataclass(kw_only=True)
class MatrixChange(LayerChange):
    """A change that is multiplied separately. factor: with the strength. names: of its tensors."""

    factor: float = 0.0
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def add_to(self, out: Tensor, rows: Tensor) -> None:
        """Adds the product of rows [M, in] to out [M, out] in place."""


@dataclass(kw_only=True)
class KroneckerChange(MatrixChange):
    """kron(C1 [out1, in1], C2 [out2, in2]): the products of C2 with each of in1 parts of a row, then those of C1."""

    left: Tensor
    right: Tensor
    names = ("left", "right")

    def add_to(self, out: Tensor, rows: Tensor) -> None:
        parts = rows.unflatten(1, (self.left.shape[1], self.right.shape[1])) @ self.right.t()  # [M, in1, out2]
        out.unflatten(1, (self.left.shape[0], self.right.shape[0])).add_(self.left @ parts, alpha=self.factor)


@dataclass(kw_only=True)
class WholeChange(MatrixChange):
    """A matrix [out, in]."""

    matrix: Tensor
    names = ("matrix",)

    def add_to(self, out: Tensor, rows: Tensor) -> None:
        out.addmm_(rows, self.matrix.t(), alpha=self.factor)


class LoraTerm:
    """The changes of one layer by several LoRAs. The ranks of all pairs are in one pair of matrices, so that they cost
    two small products. The strengths are 0 until `set_strengths`.

    bias [out] in fp32: the change of the bias; None: it does not change.
    """

    def __init__(self, changes: Sequence[LayerChange]):
        pairs = [one for one in changes if isinstance(one, PairChange)]
        biases = [one for one in changes if isinstance(one, BiasChange)]
        self._matrices = [one for one in changes if isinstance(one, MatrixChange)]
        self._ranks = [(one.lora, one.scale, one.down.shape[0]) for one in pairs]
        self._of_biases = [(one.lora, one.scale, 1) for one in biases]
        self._down = torch.cat([one.down for one in pairs]) if pairs else None  # A [rank, in]
        self._up = torch.cat([one.up for one in pairs], 1) if pairs else None  # B [out, rank]
        self._biases = torch.stack([one.bias for one in biases], 1) if biases else None  # [out, LoRAs]
        self._scales: Tensor | None = None  # [rank]
        self.bias: Tensor | None = None

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """strengths: by the numbers of the LoRAs."""
        for one in self._matrices:
            one.factor = strengths[one.lora] * one.scale
        if self._down is not None:
            self._scales = _factors(self._ranks, strengths, self._down.device)
        if self._biases is not None:
            self.bias = self._biases @ _factors(self._of_biases, strengths, self._biases.device)

    def added_to(self, out: Tensor, x: Tensor, with_bias: bool = True) -> Tensor:
        """`out` [..., out], to which the changes of the output for x [..., in] were added in place. with_bias: also the
        change of the bias."""
        rows, made = x.flatten(0, -2), out.view(-1, out.shape[-1])
        bias = self.bias if with_bias else None
        for one in self._matrices:
            one.add_to(made, rows)
        if self._down is not None:
            hidden, up = rows @ self._down.t(), self._up * self._scales
            if bias is not None:  # as one more column, which costs no further pass over the output
                hidden, up = F.pad(hidden, (0, 1), value=1.0), torch.cat([up, bias[:, None]], 1)
            made.addmm_(hidden, up.to(made.dtype).t())
        elif bias is not None:
            made.add_(bias.to(made.dtype))
        return out

    def move(self, device: torch.device) -> None:
        """Moves all tensors to a device."""
        for owner, names in self._owned():
            for name in names:
                setattr(owner, name, getattr(owner, name).to(device))

    @property
    def nbytes(self) -> int:
        return sum(getattr(owner, name).nbytes for owner, names in self._owned() for name in names)

    def _owned(self) -> list[tuple[object, list[str]]]:
        """Objects, and the names of their tensors."""
        own = [name for name in ("_down", "_up", "_biases", "_scales", "bias") if getattr(self, name) is not None]
        return [(self, own), *((one, [*one.names]) for one in self._matrices)]


def _factors(parts: list[tuple[int, float, int]], strengths: Sequence[float], device: torch.device) -> Tensor:
    """strength * scale of each column, in fp32; parts: (the LoRA's number, its scale, its number of columns)."""
    factors = [strengths[lora] * scale for lora, scale, count in parts for _ in range(count)]
    return torch.tensor(factors, dtype=torch.float32).to(device)
