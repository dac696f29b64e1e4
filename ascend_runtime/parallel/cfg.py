"""Classifier-free guidance, u + s(c - u), in series on one rank or with one branch a rank."""

from __future__ import annotations

from typing import Callable

import torch.distributed as dist
from torch import Tensor

from ..ops.precision import GUIDANCE
from .mesh import all_gather


def guided(branch: Callable[[str], Tensor], scale: float, group: dist.ProcessGroup | None) -> Tensor:
    """The guided prediction; `branch("cond" | "uncond")` computes one branch, of any shape.

    group: the two ranks of the cfg axis, or None where one rank computes both branches. Rank 0 of the axis takes
        cond, rank 1 uncond; each sends its prediction once.
    scale: 1 computes cond alone, without an exchange.
    """
    if scale == 1.0:
        return branch("cond")
    if group is None or dist.get_world_size(group) == 1:
        cond, uncond = branch("cond"), branch("uncond")
    else:
        cond, uncond = all_gather(branch(("cond", "uncond")[dist.get_rank(group)]), group)
    cond, uncond = cond.to(GUIDANCE.dtype), uncond.to(GUIDANCE.dtype)
    return uncond + scale * (cond - uncond)
