"""Lists of seeds, stored as ranges, as there may be billions."""

from __future__ import annotations

import argparse
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

LARGEST_SEED = 2**64 - 1  # ComfyUI's maximum


class Seeds:
    """The numbers in several ranges, in order and without duplicates."""

    def __init__(self, ranges: list[range]):
        self._ranges = list(_disjoint(ranges))
        self.count = sum(one.stop - one.start for one in self._ranges)  # len() has an upper bound

    def __iter__(self) -> Iterator[int]:
        for one in self._ranges:
            yield from one


def parse_seeds(text: str) -> Seeds:
    """Parses an option such as 1,2,3 or 0-4. Raises ArgumentTypeError."""
    return Seeds([_range(part) for part in text.split(",")])


def _range(part: str) -> range:
    match = re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{part[:60]!r} is not a seed; give numbers up to {LARGEST_SEED} or ascending "
                                         "ranges, such as 1,2,3 or 0-4")
    return range(first, last + 1)


def _disjoint(ranges: list[range]) -> Iterator[range]:
    """Splits the ranges so that none overlaps with an earlier one."""
    starts: list[int] = []
    stops: list[int] = []  # of all earlier ranges, merged and sorted
    for one in ranges:
        first, last = bisect_left(stops, one.start), bisect_right(starts, one.stop)  # overlapping or adjacent ranges
        begin = one.start
        for start, stop in zip(starts[first:last], stops[first:last]):
            if begin < start:
                yield range(begin, start)
            begin = max(begin, stop)
        if begin < one.stop:
            yield range(begin, one.stop)
        merged = [*starts[first:last], one.start], [*stops[first:last], one.stop]
        starts[first:last], stops[first:last] = [min(merged[0])], [max(merged[1])]
