"""RainFusion: block-sparse self-attention for video (Chen et al., arXiv 2505.21036, 2512.24086).

A head's mask depends on all its queries and keys, which are on one rank with Ulysses and tensor parallelism.
With overlapped exchanges, an attention is computed in several parts, each with some of the heads and its own mask.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Protocol

import torch
from torch import Tensor

from ..models.shared.block_stack import At, Attend
from ..ops import PlainOperators
from ..ops.plain import SparsePattern
from ..specs import RainFusionSpec
from . import masks
from .bricks import Order, TokenGrid, bricks, by_frames, by_places, tiles
from .tally import Tally


class MaskPlan(NamedTuple):
    """The choice of a mask, to reuse in a later step. density [heads]: of the mask. by_frames [heads]: see `_Bands`."""

    pattern: SparsePattern
    density: Tensor
    by_frames: Tensor | None = None


class Attended(NamedTuple):
    """out: has the query's shape."""

    out: Tensor
    plan: MaskPlan


class Version(Protocol):
    """A version of RainFusion: attention on tensors [B, S, heads, head_dim]. plan: None to choose the mask now."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan | None) -> Attended: ...


class JobSize(NamedTuple):
    """grid: the video's tokens; text tokens may follow them in the sequence, and attend to all. steps: the number of
    the job's steps. blocks: the number of the network's blocks."""

    grid: TokenGrid
    steps: int
    blocks: int


class RainFusion:
    """The sparse attention of one job."""

    def __init__(self, spec: RainFusionSpec, size: JobSize, operators: PlainOperators, tally: Tally):
        self._spec, self._steps, self._blocks, self._tally = spec, size.steps, size.blocks, tally
        self._version = version_of(spec, size.grid, operators)
        self._plans: dict[tuple[str, str, int, int], tuple[int, MaskPlan]] = {}  # by expert, branch, block and part

    def attention(self, at: At, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        """The output of `compute` with sparse or dense attention, as this step and block require."""
        if self._spec.sparsity == 0 or not self._spec.sparse_in(at.step, self._steps, block, self._blocks):
            return compute(None)
        densities: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended = self._part(at, block, len(densities), query, key, value)
            densities.append(attended.plan.density)
            return attended.out

        out = compute(attend)
        self._tally.sparse_attention(at, block, torch.cat(densities).mean())
        return out

    def _part(self, at: At, block: int, part: int, *qkv: Tensor) -> Attended:
        """Computes one part, with a plan that is kept for a period of `refresh` steps. The period's first step may have
        been skipped by a cache."""
        key = (at.expert, at.branch, block, part)
        period = (at.step - self._spec.begins(self._steps)) // self._spec.refresh
        decided, plan = self._plans.get(key, (None, None))
        attended = self._version(*qkv, plan if decided == period else None)
        if self._spec.refresh > 1:
            self._plans[key] = period, attended.plan
        return attended


def version_of(spec: RainFusionSpec, grid: TokenGrid, operators: PlainOperators) -> Version:
    """The version that the spec selects."""
    if spec.version == "v1":
        return _Bands(spec.sparsity, grid, operators)
    return _Bricks(spec.sparsity, bricks if spec.version == "v2" else tiles, grid, operators)


class _Bricks:
    """Versions 2 and 3: the best matching mask blocks."""

    def __init__(
        self,
        sparsity: float,
        order: Callable[[TokenGrid, torch.device, int], Order],
        grid: TokenGrid,
        operators: PlainOperators,
    ):
        self._sparsity, self._order, self._grid, self._operators = sparsity, order, grid, operators

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan | None) -> Attended:
        order = self._order(self._grid, query.device, query.shape[1] - math.prod(self._grid))
        query, key, value = (order.apply(x) for x in (query, key, value))
        if plan is None:
            mask = masks.best(query, key, self._sparsity, order.protected)
            plan = MaskPlan(self._operators.sparse_pattern(mask), masks.density(mask, query.shape[2]).mean(0))
        return Attended(order.undo(self._operators.sparse_attention(query, key, value, plan.pattern)), plan)


class _Bands:
    """Version 1: each head attends within a band in (t h w) or in (h w t) order. A plan's by_frames [heads] is True for
    the first. Every tensor is brought into both orders, and each head takes one of them: to choose the heads of an
    order, the host would wait for the device."""

    def __init__(self, sparsity: float, grid: TokenGrid, operators: PlainOperators):
        self._sparsity, self._grid, self._operators = sparsity, grid, operators

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan | None) -> Attended:
        behind = query.shape[1] - math.prod(self._grid)
        orders = tuple(order(self._grid, query.device, behind) for order in (by_frames, by_places))
        plan = plan or self._plan(query, key, orders)
        first = plan.by_frames.view(-1, 1, 1)
        query, key, value = (torch.where(first, *(order.apply(x) for order in orders)) for x in (query, key, value))
        out = self._operators.sparse_attention(query, key, value, plan.pattern)
        return Attended(torch.where(first.squeeze(-1), *(order.undo(out) for order in orders)), plan)

    def _plan(self, query: Tensor, key: Tensor, orders: tuple[Order, ...]) -> MaskPlan:
        band = masks.band(len(orders[0].protected), self._sparsity, query.device)
        allowed = tuple(band | masks.either(order.protected) for order in orders)
        first = masks.recalls(query, key, orders, allowed).diff(dim=0).squeeze(0) <= 0
        mask = torch.where(first.view(-1, 1, 1), *allowed)
        pattern = self._operators.sparse_pattern(mask.expand(query.shape[0], -1, -1, -1))
        return MaskPlan(pattern, masks.density(mask, query.shape[1]), first)
