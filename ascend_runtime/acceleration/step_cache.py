"""Step caches: what all blocks add to the tokens in one step stands for what they would add in the next ones.

Whether a step may do with that is asked once, of the cond branch alone, and holds for both: guidance multiplies the
difference of the branches, so both must be of one step; and guidance in series then decides as on two ranks. All ranks
decide alike, as a rank that leaves out blocks does not answer one that gathers their weights.
diffusers has hooks for such caches (FirstBlockCacheConfig and others); they decide on each rank for itself, and know of
no expert or step.
"""

from __future__ import annotations

import math
from typing import Collection, Protocol

from torch import Tensor

from ..models.shared.block_stack import At, BlockStack
from .tally import Tally


class Rule(Protocol):
    """When a step may be left out. leading: blocks that are computed in any case, for what they tell."""

    leading: int

    def sees(self, stack: BlockStack, tokens: Tensor, led: Tensor) -> Tensor | None:
        """What it looks at, in the cond branch. tokens, led [B, S, D]: before and after the leading blocks."""

    def reuses(self, step: int, seen: Tensor | None, forced: bool) -> bool:
        """Whether a step is left out. Asked once a step, on all ranks; those that compute uncond alone see nothing.

        forced: it is computed in any case, and the answer must be that.
        """


class StepCache:
    """Of one expert. always: steps that are computed. most: steps in a row that may be left out.

    order: of the Taylor expansion that foretells what the blocks add; 0 is what they added last.
    """

    def __init__(self, rule: Rule, always: Collection[int], most: int, order: int, tally: Tally):
        self._rule, self._always, self._most, self._order = rule, always, most, order
        self._tally = tally
        self._kept: dict[str, Expansion] = {}  # by branch
        self._left_out = 0  # in a row
        self._decided: tuple[int | None, bool] = None, False

    def blocks(self, at: At, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        led = stack.through(tokens, range(self._rule.leading))
        if self._decided[0] != at.step:
            seen = self._rule.sees(stack, tokens, led) if at.branch == "cond" else None
            self._decided = at.step, self._decide(at.step, seen)
        if self._decided[1]:
            self._tally.skipped_blocks(at, range(self._rule.leading, stack.count))
            return self._kept[at.branch].added_to(led, at.step)
        out = stack.through(led, range(self._rule.leading, stack.count))
        self._kept.setdefault(at.branch, Expansion(self._order)).learn(out - led, at.step)
        return out

    def _decide(self, step: int, seen: Tensor | None) -> bool:
        forced = not self._kept or step in self._always or self._left_out >= self._most
        reuses = self._rule.reuses(step, seen, forced)
        self._left_out = self._left_out + 1 if reuses else 0
        return reuses


class Expansion:
    """A tensor as a Taylor series in the number of the step, of the values that were learnt (TaylorSeer, arXiv
    2503.06923): derivatives are backward differences, those of an order that is too high yet are left out."""

    def __init__(self, order: int):
        self._order = order
        self._derivatives: list[Tensor] = []
        self._step = 0

    def learn(self, value: Tensor, step: int) -> None:
        before, self._derivatives = self._derivatives, [value]
        for _ in range(min(self._order, len(before))):
            lower = before.pop(0)  # so that it is freed here
            self._derivatives.append((self._derivatives[-1] - lower).div_(step - self._step))
        self._step = step

    def added_to(self, x: Tensor, step: int) -> Tensor:
        """x and the value that is foretold for a step."""
        x = x + self._derivatives[0]
        for order, derivative in enumerate(self._derivatives[1:], 1):
            x.add_(derivative, alpha=(step - self._step) ** order / math.factorial(order))
        return x
