"""Step caches: reuse the residual that all blocks add to the tokens in one step for the next steps.

A rule decides once per step, on the cond branch, and the decision holds for both branches. Guidance scales their
difference, so both must come from the same step; and guidance in series then decides as guidance on two ranks does. All
ranks decide alike, because a rank that skips blocks takes no part in gathering their weights.
diffusers' hooks for such caches (FirstBlockCacheConfig and others) decide per rank, and have no experts or steps.
"""

from __future__ import annotations

import math
from typing import Collection, Protocol

from torch import Tensor

from ..models.shared.block_stack import At, BlockStack
from .tally import Tally


class SkipRule(Protocol):
    """Decides which steps to skip. leading: the number of first blocks that are always computed, as rules use them."""

    leading: int

    def sees(self, stack: BlockStack, tokens: Tensor, led: Tensor) -> Tensor | None:
        """The tensor to decide by. Called once per step, on all ranks; only the cond branch's result is used. tokens,
        led [B, S, D]: before and after the leading blocks."""

    def reuses(self, step: int, seen: Tensor | None, forced: bool) -> bool:
        """Whether to skip a step. Called once per step, on all ranks; `seen` is None on ranks of the uncond branch.

        forced: the step must be computed, so the result must be False.
        """


class StepCache:
    """The cache of one expert. always: steps that must be computed. most: the maximum of consecutive skipped steps.

    order: of the Taylor expansion that predicts the blocks' residual; 0 reuses the last one.
    """

    def __init__(self, rule: SkipRule, always: Collection[int], most: int, order: int, tally: Tally):
        self._rule, self._always, self._most, self._order = rule, always, most, order
        self._tally = tally
        self._kept: dict[str, Expansion] = {}  # by branch
        self._skipped = 0  # consecutive steps
        self._decided: tuple[int | None, bool] = None, False

    def blocks(self, at: At, stack: BlockStack, tokens: Tensor) -> Tensor:
        """The tokens [B, S, D] after the whole stack."""
        led = stack.through(tokens, range(self._rule.leading))
        if self._decided[0] != at.step:
            seen = self._rule.sees(stack, tokens, led)  # on all ranks: it may gather a block's weights
            self._decided = at.step, self._decide(at.step, seen if at.branch == "cond" else None)
        if self._decided[1]:
            self._tally.skipped_blocks(at, range(self._rule.leading, stack.count))
            return self._kept[at.branch].added_to(led, at.step)
        out = stack.through(led, range(self._rule.leading, stack.count))
        self._kept.setdefault(at.branch, Expansion(self._order)).learn(out - led, at.step)
        return out

    def _decide(self, step: int, seen: Tensor | None) -> bool:
        forced = not self._kept or step in self._always or self._skipped >= self._most
        reuses = self._rule.reuses(step, seen, forced)
        self._skipped = self._skipped + 1 if reuses else 0
        return reuses


class Expansion:
    """Extrapolates a tensor over steps by a Taylor expansion (TaylorSeer, arXiv 2503.06923). Derivatives are backward
    differences of the learnt values; with too few values, higher orders are omitted."""

    def __init__(self, order: int):
        self._order = order
        self._derivatives: list[Tensor] = []
        self._step = 0

    def learn(self, value: Tensor, step: int) -> None:
        before, self._derivatives = self._derivatives, [value]
        for _ in range(min(self._order, len(before))):
            lower = before.pop(0)  # pop, to free it here
            self._derivatives.append((self._derivatives[-1] - lower).div_(step - self._step))
        self._step = step

    def added_to(self, x: Tensor, step: int) -> Tensor:
        """x plus the predicted value at a step."""
        x = x + self._derivatives[0]
        for order, derivative in enumerate(self._derivatives[1:], 1):
            x.add_(derivative, alpha=(step - self._step) ** order / math.factorial(order))
        return x
