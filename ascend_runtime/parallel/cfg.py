"""Classifier-free guidance: both branches one after the other on one rank, or each on a rank of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from ..ops.precision import GUIDANCE
from .mesh import all_gather

Call = TypeVar("Call")


def is_spread(calls: Sequence, group: dist.ProcessGroup | None) -> bool:
    """Whether each of these calls is computed on a rank of its own."""
    return group is not None and len(calls) == dist.get_world_size(group) > 1


def own_calls(calls: Sequence[Call], group: dist.ProcessGroup | None) -> Sequence[Call]:
    """Those that this rank computes."""
    return [calls[dist.get_rank(group)]] if is_spread(calls, group) else calls


def computed(
    calls: Sequence[Call], compute: Callable[[Call], Tensor], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """`compute` of every call, all results of one shape.

    group: the ranks of the cfg axis, or None where one rank computes all. Where there are as many calls as ranks, each
    rank computes one and sends its result once; else every rank computes all, without an exchange.
    """
    own = [compute(call) for call in own_calls(calls, group)]
    return list(all_gather(own[0], group)) if is_spread(calls, group) else own


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """u + s(c - u) (Ho & Salimans, arXiv 2207.12598), in fp32."""
    cond, uncond = cond.to(GUIDANCE.dtype), uncond.to(GUIDANCE.dtype)
    return uncond + scale * (cond - uncond)
