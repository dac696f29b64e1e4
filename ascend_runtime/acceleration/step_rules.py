"""Rules of step caches, which decide which steps to skip: first-block cache, TeaCache, MagCache and TaylorSeer."""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from ..models.shared.block_stack import BlockStack
from ..parallel.mesh import all_reduce_sum


class Reference:
    """A tensor, spread over all ranks, that later tensors are compared with."""

    def __init__(self):
        self._kept, self._size = None, None

    def keep(self, seen: Tensor | None) -> None:
        if seen is not None:
            self._kept, self._size = seen, _size(seen)

    def change(self, seen: Tensor | None) -> float:
        """The relative L1 distance sum |seen - kept| / sum |kept| over all ranks. All ranks must call it; a rank
        without a tensor passes None."""
        sums = torch.zeros(2) if seen is None else torch.stack((_size(seen - self._kept), self._size))
        distance, size = all_reduce_sum(sums)
        return distance / size if size else math.inf


def _size(x: Tensor) -> Tensor:
    return x.abs().sum(dtype=torch.float32)


class FirstBlock:
    """ParaAttention's first-block cache: skips while the first block's residual differs little from that in the last
    computed step. own: the number of tokens on this rank, without padding."""

    leading = 1

    def __init__(self, threshold: float, own: int):
        self._threshold, self._own = threshold, own
        self._computed = Reference()

    def sees(self, stack: BlockStack, tokens: Tensor, led: Tensor) -> Tensor:
        return led[:, : self._own] - tokens[:, : self._own]

    def reuses(self, step: int, seen: Tensor | None, forced: bool) -> bool:
        if not forced and self._computed.change(seen) < self._threshold:
            return True
        self._computed.keep(seen)
        return False


class TeaCache:
    """TeaCache (arXiv 2411.19108): skips while the blocks' output is estimated to have changed little since the last
    computed step. The estimate adds up changes of the family's indicator (see `BlockStack`).

    coefficients: of the polynomial from the indicator's relative change to the output's, highest power first.
    """

    leading = 0

    def __init__(self, threshold: float, coefficients: Sequence[float], own: int):
        self._threshold, self._coefficients, self._own = threshold, coefficients, own
        self._before = Reference()
        self._expected = 0.0

    def sees(self, stack: BlockStack, tokens: Tensor, led: Tensor) -> Tensor:
        return stack.indicator(tokens, self._own)

    def reuses(self, step: int, seen: Tensor | None, forced: bool) -> bool:
        if not forced:
            self._expected += abs(polynomial(self._coefficients, self._before.change(seen)))
        self._before.keep(seen)
        if not forced and self._expected < self._threshold:
            return True
        self._expected = 0.0
        return False


class MagCache:
    """MagCache (arXiv 2506.09045): skips while the error, predicted from calibrated magnitude ratios, is small.

    ratios: step -> the norm of the blocks' residual divided by that of the step before.
    """

    leading = 0

    def __init__(self, threshold: float, ratios: dict[int, float]):
        self._threshold, self._ratios = threshold, ratios
        self._ratio, self._error = 1.0, 0.0

    def sees(self, stack: BlockStack, tokens: Tensor, led: Tensor) -> None:
        return None

    def reuses(self, step: int, seen: Tensor | None, forced: bool) -> bool:
        if not forced:
            self._ratio *= self._ratios[step]
            self._error += abs(1 - self._ratio)
            if self._error < self._threshold:
                return True
        self._ratio, self._error = 1.0, 0.0
        return False


class Always:
    """Skips every step that may be skipped (TaylorSeer, whose interval limits consecutive skipped steps)."""

    leading = 0

    def __init__(self, threshold: float):
        self._reuses = threshold > 0

    def sees(self, stack: BlockStack, tokens: Tensor, led: Tensor) -> None:
        return None

    def reuses(self, step: int, seen: Tensor | None, forced: bool) -> bool:
        return self._reuses and not forced


def polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
