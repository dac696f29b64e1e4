"""Tensor parallelism: each rank holds an equal slice of a layer's weights (Shoeybi et al., arXiv 1909.08053).

A column-parallel layer, cut along its outputs, computes some of the heads, or a part of the feed-forward's inner width.
The row-parallel layer after it, cut along its inputs, reads only these, and an all-reduce completes its output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import PlainOperators
from ..ops.precision import NORMS
from .mesh import Member


@dataclass(frozen=True)
class WholeWeights:
    """A block's layers without tensor parallelism."""

    degree = 1
    rank = 0

    def rms_norms(self, ops: PlainOperators, eps: float, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Applies each pair's norm to its tensor [..., D]."""
        return [ops.rms_norm(x, norm.weight, eps) for norm, x in pairs]

    def row_linear(self, ops: PlainOperators, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer that follows a column-parallel one; x [B, S, K]."""
        return layer(x)


@dataclass(frozen=True)
class TensorParallel(Member):
    """A block's layers on a rank that holds one of `degree` slices, those of `group`.

    Communication per rank and Wan block: 2 (T-1)/T times three all-reduces of the rank's tokens [B, S', D], one for
    each row-parallel layer, and 4 B (3 S' + L) bytes for the norms (L text tokens, plus those of an image; 0 if
    `Context` has cached their keys).
    """

    def rms_norms(self, ops: PlainOperators, eps: float, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Norms over the full width D, of which each x [..., D/T] is this rank's slice. One all-reduce sums the squares
        of all pairs."""
        wide = [x.to(NORMS.dtype) for _, x in pairs]
        squares = [x.square().sum(-1, keepdim=True) for x in wide]
        total = torch.cat([part.flatten() for part in squares])
        dist.all_reduce(total, group=self.group)
        totals = total.split([part.numel() for part in squares])
        return [
            (x * torch.rsqrt(summed.view_as(part) / (x.shape[-1] * self.degree) + eps) * norm.weight).type_as(given)
            for (norm, given), x, part, summed in zip(pairs, wide, squares, totals)
        ]

    def row_linear(self, ops: PlainOperators, layer: nn.Module, x: Tensor) -> Tensor:
        """x [B, S, K/T] -> the full output on every rank. layer: nn.Linear, or a layer with its own all-reduce."""
        if not isinstance(layer, nn.Linear):
            return layer.all_reduced(x, self)
        return ops.linear_all_reduce(x, layer.weight, layer.bias, self.group)


def slice_of(size: int, tp: WholeWeights | TensorParallel) -> slice:
    """This rank's slice of `size` outputs or inputs; T divides `size`."""
    width = size // tp.degree
    return slice(tp.rank * width, (tp.rank + 1) * width)
