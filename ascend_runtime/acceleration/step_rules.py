"""When a step cache leaves out a step: first-block cache, TeaCache, MagCache and TaylorSeer."""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from ..models.shared.block_stack import BlockStack
from ..parallel.mesh import summed


class Reference:
    """What later tensors are compared with, on all ranks as if they were one."""

    def __init__(self):
        self._kept, self._size = None, None

    def keep(self, seen: Tensor | None) -> None:
        if seen is not None:
            self._kept, self._size = seen, _size(seen)

    def change(self, seen: Tensor | None) -> float:
        """The relative L1 distance to it, sum |seen - kept| / sum |kept|. Every rank must ask; None counts nothing."""
        sums = torch.zeros(2) if seen is None else torch.stack((_size(seen - self._kept), self._size))
        distance, size = summed(sums)
        return distance / size if size else math.inf


def _size(x: Tensor) -> Tensor:
    return x.abs().sum(dtype=torch.float32)


class FirstBlock:
    """What the first block adds differs little from what it added in the last step that was computed (ParaAttention's
    first-block cache). own: tokens of this rank, without padding."""

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
    """What the timestep embedding's changes let expect of the blocks' comes to little since the last step that was
    computed (arXiv 2411.19108).

    coefficients: of the polynomial from one relative change to the other, the highest power's first.
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
    """The error that is made, as the known magnitudes of what the blocks add predict it, is small (arXiv 2506.09045).

    ratios: of these magnitudes, to those of the step before, by the number of the step.
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
    """Whenever it may be (TaylorSeer, whose steps are computed one in so many)."""

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
