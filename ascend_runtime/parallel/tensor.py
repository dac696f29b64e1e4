"""Tensor parallelism: each rank holds an equal slice of a layer's weights (Shoeybi et al., arXiv 1909.08053).

A column-parallel layer, cut along its outputs, computes some of the heads, or a part of the feed-forward's inner width.
The row-parallel layer after it, cut along its inputs, reads only these, and an all-reduce completes its output.
Modulation layers are column-parallel for their memory only: their few outputs are all-gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import PlainOperators
from ..ops.precision import NORMS
from .mesh import Member, all_gather


def check_degree(heads: int, ffn_dim: int, degree: int) -> None:
    """Raises ValueError if tensor parallelism of this degree cannot cut blocks of these sizes."""
    most = math.gcd(heads, ffn_dim)
    if most % degree:
        legal = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise ValueError(
            f"tp_degree is {degree}; it must divide this model's {heads} heads and its feed-forward width {ffn_dim}. "
            f"Set it to one of {legal}; use the other ranks for ulysses_degree or ring_degree."
        )


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

    def row_linears(self, ops: PlainOperators, *pairs: tuple[nn.Module, Tensor]) -> Tensor:
        """The sum of layers, each of its own input [B, S, K]."""
        return _sum(lambda layer, x: layer(x), *pairs)

    def gathered(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """Whole outputs [..., N] of layers of one input, which are column-parallel for their memory only."""
        return [layer(x) for layer in layers]


@dataclass(frozen=True)
class TensorParallel(Member):
    """A block's layers on a rank that holds one of `degree` slices, those of `group`.

    Communication per rank and Wan block: 2 (T-1)/T times three all-reduces of the rank's tokens [B, S', D], one for
    each row-parallel layer, and 4 B (3 S' + L) bytes for the norms (L text tokens, plus those of an image; 0 if
    `Context` has cached their keys).
    Per rank and HunyuanVideo block: two such all-reduces in a double block, one in a single block, and an all-gather of
    modulation: [B, 6 D] of each stream on the rank, or [B, 3 D]. Its norms are those of single heads.
    """

    def rms_norms(self, ops: PlainOperators, eps: float, *pairs: tuple[nn.RMSNorm, Tensor]) -> list[Tensor]:
        """Norms over the full width D, of which each x [..., D/T] is this rank's slice. One all-reduce sums the squares
        of all pairs."""
        wide = [x.to(NORMS.dtype) for _, x in pairs]
        squares = [x.square().sum(-1, keepdim=True) for x in wide]
        total = torch.cat([part.flatten() for part in squares])
        self._add_up(total)
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

    def row_linears(self, ops: PlainOperators, *pairs: tuple[nn.Module, Tensor]) -> Tensor:
        """As WholeWeights', each x [B, S, K/T]: one all-reduce of the sum."""
        made = _sum(self._part, *pairs)
        biases = [layer.bias if isinstance(layer, nn.Linear) else layer.added(made.dtype) for layer, _ in pairs]
        biases = [bias for bias in biases if bias is not None]
        return ops.summed(made, sum(biases[1:], biases[0]) if biases else None, self.group)

    def _part(self, layer: nn.Module, x: Tensor) -> Tensor:
        """This rank's summand of a row-parallel layer's output, without the bias."""
        return F.linear(x, layer.weight) if isinstance(layer, nn.Linear) else layer.part(x, self)

    def gathered(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """As WholeWeights', by one all-gather; each layer makes this rank's part of its outputs."""
        made = [layer(x) for layer in layers]  # [..., N/T]
        ranks = self._all_gather(torch.cat(made, -1))
        return [part.movedim(0, -2).flatten(-2) for part in ranks.split([part.shape[-1] for part in made], -1)]

    def _add_up(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def _all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]"""
        return all_gather(x, self.group)


def _sum(compute: Callable[[nn.Module, Tensor], Tensor], *pairs: tuple[nn.Module, Tensor]) -> Tensor:
    """The sum of what `compute` makes of each layer and its input."""
    (layer, x), *others = pairs
    made = compute(layer, x)
    for layer, x in others:
        if isinstance(layer, nn.Linear) and layer.bias is None:  # a product that adds costs no pass of its own
            made = torch.addmm(made.flatten(0, -2), x.flatten(0, -2), layer.weight.t()).view_as(made)
        else:
            made = made.add_(compute(layer, x))
    return made


def slice_of(size: int, tp: WholeWeights | TensorParallel) -> slice:
    """This rank's slice of `size` outputs or inputs; T divides `size`."""
    width = size // tp.degree
    return slice(tp.rank * width, (tp.rank + 1) * width)
