"""Numbers of ranks, in words."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Such as "rank 3", "ranks 0, 1", or "ranks 0 to 3, 6"."""
    numbers = sorted(ranks)
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {_spans(numbers)}"


def _spans(numbers: list[int]) -> str:
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    lists = [[str(rank) for _, rank in run] for _, run in runs]
    return ", ".join(", ".join(run) if len(run) < 3 else f"{run[0]} to {run[-1]}" for run in lists)
