"""RainFusion: self-attention of a video computes a part of its products (Chen et al., arXiv 2505.21036, 2512.24086).

Which part, is decided from each head's queries and keys, all of which a rank has under Ulysses and tensor parallelism.
An attention may come in parts, some heads each (overlapped exchanges); each part decides for itself.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Protocol

import torch
from torch import Tensor

from ..models.shared.block_stack import At, Attend
from ..ops import PlainOperators
from ..specs import RainFusionSpec
from . import masks
from .bricks import Grid, Order, bricks, by_frames, by_places, tiles
from .tally import Tally


class Attended(NamedTuple):
    """out: as the query. plan: what was decided, to be given in a later step. density: of each head, a number."""

    out: Tensor
    plan: Tensor
    density: Tensor


class Version(Protocol):
    """One of RainFusion's, of tensors [B, S, heads, head_dim] and, where it was decided before, a plan."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Tensor | None) -> Attended: ...


class RainFusion:
    """grid: of the video's tokens; those of a text may follow them, and attend to all. steps, blocks: of the job and of
    the network."""

    def __init__(
        self, spec: RainFusionSpec, grid: Grid, steps: int, blocks: int, operators: PlainOperators, tally: Tally
    ):
        self._spec, self._steps, self._blocks, self._tally = spec, steps, blocks, tally
        self._version = version_of(spec, grid, operators)
        self._plans: dict[tuple[str, str, int, int], tuple[int, Tensor]] = {}  # by expert, branch, block and part

    def attention(self, at: At, block: int, compute: Callable[[Attend | None], Tensor]) -> Tensor:
        """What `compute` makes with the attention of this step and block, sparse or not."""
        if self._spec.sparsity == 0 or not self._spec.sparse_in(at.step, self._steps, block, self._blocks):
            return compute(None)
        densities: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended = self._part(at, block, len(densities), query, key, value)
            densities.append(attended.density)
            return attended.out

        out = compute(attend)
        self._tally.sparse_attention(at, block, torch.cat(densities).mean())
        return out

    def _part(self, at: At, block: int, part: int, *qkv: Tensor) -> Attended:
        """A plan serves for one period of `refresh` steps. A cache may have left out the step that begins it."""
        key = (at.expert, at.branch, block, part)
        period = (at.step - self._spec.begins(self._steps)) // self._spec.refresh
        decided, plan = self._plans.get(key, (None, None))
        attended = self._version(*qkv, plan if decided == period else None)
        if self._spec.refresh > 1:
            self._plans[key] = period, attended.plan
        return attended


def version_of(spec: RainFusionSpec, grid: Grid, operators: PlainOperators) -> Version:
    """What a description asks for."""
    if spec.version == "v1":
        return _Bands(spec.sparsity, grid, operators)
    return _Bricks(spec.sparsity, bricks if spec.version == "v2" else tiles, grid, operators)


class _Bricks:
    """Versions 2 and 3: the mask blocks that match best. A plan is their mask."""

    def __init__(
        self, sparsity: float, order: Callable[[Grid, torch.device, int], Order], grid: Grid, operators: PlainOperators
    ):
        self._sparsity, self._order, self._grid, self._operators = sparsity, order, grid, operators

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Tensor | None) -> Attended:
        order = self._order(self._grid, query.device, query.shape[1] - math.prod(self._grid))
        query, key, value = (order.of(x) for x in (query, key, value))
        mask = masks.best(query, key, self._sparsity, order.protected) if plan is None else plan
        out = self._operators.sparse_attention(query, key, value, mask)
        return Attended(order.undone(out), mask, masks.density(mask, query.shape[2]).mean(0))


class _Bands:
    """Version 1: each head attends to its neighbours by frames or by places. A plan tells which heads do the first."""

    def __init__(self, sparsity: float, grid: Grid, operators: PlainOperators):
        self._sparsity, self._grid, self._operators = sparsity, grid, operators

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Tensor | None) -> Attended:
        length = query.shape[1]
        behind = length - math.prod(self._grid)
        orders = tuple(order(self._grid, query.device, behind) for order in (by_frames, by_places))
        band = masks.band(len(orders[0].protected), self._sparsity, query.device)
        allowed = tuple(band | masks.either(order.protected) for order in orders)
        if plan is None:
            plan = masks.recalls(query, key, orders, allowed).diff(dim=0).squeeze(0) <= 0
        out, density = torch.empty_like(query), torch.empty(len(plan), device=query.device)
        for heads, order, mask in zip((plan, ~plan), orders, allowed):
            heads = heads.nonzero().flatten()
            if len(heads):
                some = (order.of(x.index_select(2, heads)) for x in (query, key, value))
                mask = mask.expand(query.shape[0], len(heads), -1, -1)
                out[:, :, heads] = order.undone(self._operators.sparse_attention(*some, mask))
                density[heads] = masks.density(mask[0], length)
        return Attended(out, plan, density)
