"""How much the steps of a job change, which is what TeaCache and MagCache have to know of a model beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.shared.block_stack import At, BlockStack
from ..parallel.mesh import summed
from .step_rules import Reference
from .tally import Change, Tally


class Measuring:
    """Of one expert; leaves nothing out. own: tokens of this rank, without padding."""

    def __init__(self, own: int, tally: Tally):
        self._own, self._tally = own, tally
        self._timestep, self._output = Reference(), Reference()
        self._norms: Tensor | None = None
        self._step: int | None = None

    def blocks(self, at: At, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        out = stack.through(tokens, range(stack.count))
        if self._step != at.step:  # cond, or the one branch of this rank
            seen = None, None, None
            if at.branch == "cond":
                added = (out - tokens)[:, : self._own].float()
                seen = stack.indicator(tokens, self._own), out[:, : self._own], added.norm(dim=-1)
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
        ratio, count = summed(ratios)
        return self._timestep.change(timestep), self._output.change(output), ratio / count
