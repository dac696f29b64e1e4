"""Measures how much successive steps differ, which is the calibration data of TeaCache and MagCache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.shared.block_stack import At, BlockStack
from ..parallel.mesh import all_reduce_sum
from .step_rules import Reference
from .tally import Change, Tally


class Measuring:
    """Measures the steps of one expert; skips nothing. own: the number of tokens on this rank, without padding."""

    def __init__(self, own: int, tally: Tally):
        self._own, self._tally = own, tally
        self._timestep, self._output = Reference(), Reference()
        self._norms: Tensor | None = None
        self._step: int | None = None

    def blocks(self, at: At, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        out = stack.through(tokens, range(stack.count))
        if self._step != at.step:  # the first pass of a step: cond, or the only branch of this rank
            indicator = stack.indicator(tokens, self._own)  # on all ranks: it may gather a block's weights
            seen = None, None, None
            if at.branch == "cond":
                added = (out - tokens)[:, : self._own].float()
                seen = indicator, out[:, : self._own], added.norm(dim=-1)
            if self._step is not None:
                self._tally.changed(Change(at.expert, at.step, *self._changes(*seen)))
            self._timestep.keep(seen[0])
            self._output.keep(seen[1])
            self._norms, self._step = seen[2], at.step
        return out

    def _changes(self, timestep: Tensor | None, output: Tensor | None, norms: Tensor | None) -> tuple[float, ...]:
        if norms is None:
            ratios = torch.zeros(2)
        else:
            each = norms / self._norms.clamp_min(1e-8)
            ratios = torch.stack((each.sum(), each.new_tensor(each.numel())))
        ratio, count = all_reduce_sum(ratios)
        return self._timestep.change(timestep), self._output.change(output), ratio / count
