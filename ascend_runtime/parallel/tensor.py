"""Tensor parallelism: ranks hold equal slices of a layer's weights (Shoeybi et al., arXiv 1909.08053).

A layer cut by its outputs (columns) makes some of the heads, or a part of the feed-forward's inner width; the layer
after it, cut by its inputs (rows), reads just these, and a sum over the ranks makes its output whole.
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
    """Layers on one rank: what a block computes where its weights are not cut."""

    degree = 1
    rank = 0

    def rms_norms(self, ops: PlainOperators, eps: float, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Each tensor [..., D] of the pairs, normalised by the norm beside it."""
        return [ops.rms_norm(x, norm.weight, eps) for norm, x in pairs]

    def row_linear(self, ops: PlainOperators, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer after one that is cut by columns; x [B, S, K]."""
        return layer(x)


@dataclass(frozen=True)
class TensorParallel(Member):
    """The same on a rank that holds one slice of `degree`, those of `group`.

    Sends, a rank and a Wan block, 2 (T-1)/T times these bytes: of its tokens [B, S', D], three times, once a row
    layer; and 4 B (3 S' + L) for the norms (L tokens of text, an image's count as well; none where `Context` has
    their keys).
    """

    def rms_norms(self, ops: PlainOperators, eps: float, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Over the full width, of which x [..., D/T] is this rank's slice; the squares of all pairs are summed in one
        exchange."""
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
        """x [B, S, K/T] -> the whole output, on every rank. layer: nn.Linear, or one that reduces by itself."""
        if not isinstance(layer, nn.Linear):
            return layer.all_reduced(x, self)
        return ops.linear_all_reduce(x, layer.weight, layer.bias, self.group)


def slice_of(size: int, tp: WholeWeights | TensorParallel) -> slice:
    """This rank's of `size` equal outputs or inputs; T divides it."""
    width = size // tp.degree
    return slice(tp.rank * width, (tp.rank + 1) * width)
