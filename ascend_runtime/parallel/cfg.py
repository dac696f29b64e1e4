"""Classifier-free guidance: computes both branches in sequence on one rank, or in parallel on two ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from ..ops.precision import GUIDANCE
from .mesh import all_gather

_Call = TypeVar("_Call")


def is_spread(calls: Sequence, group: dist.ProcessGroup | None) -> bool:
    """Whether each of these calls is computed on a different rank."""
    return group is not None and len(calls) == dist.get_world_size(group) > 1


def own_calls(calls: Sequence[_Call], group: dist.ProcessGroup | None) -> Sequence[_Call]:
    """The calls that this rank computes."""
    return [calls[dist.get_rank(group)]] if is_spread(calls, group) else calls


def computed(
    calls: Sequence[_Call], compute: Callable[[_Call], Tensor], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """The results of `compute` for all calls, which must have the same shape.

    group: the ranks of the cfg axis; None: one rank computes all. If there are as many calls as ranks, each rank
    computes one, and an all-gather exchanges the results. Else every rank computes all, without communication.
    """
    own = [compute(call) for call in own_calls(calls, group)]
    return list(all_gather(own[0], group)) if is_spread(calls, group) else own


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """u + s(c - u) (Ho & Salimans, arXiv 2207.12598), in fp32."""
    cond, uncond = cond.to(GUIDANCE.dtype), uncond.to(GUIDANCE.dtype)
    return uncond + scale * (cond - uncond)
