"""Maps tensors on disk to parameters: a tensor may hold several parameters, or one with its rows in another order.

A fused layer concatenates the rows of query, key and value (and possibly more). A modulation may have its halves
swapped: scale | shift, where the network has shift | scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Rows = tuple[slice, ...]  # ranges of a tensor's rows (dim 0), concatenated in this order; none with a step


def row_count(rows: Rows) -> int:
    """The number of rows in these ranges."""
    return sum(own.stop - own.start for own in rows)


@dataclass(frozen=True)
class Target:
    """A parameter that a tensor holds. rows: its ranges of the tensor's rows, in the parameter's order; None: all."""

    name: str
    rows: Rows | None = None

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, given the tensor's shape."""
        return shape if self.rows is None else (row_count(self.rows), *shape[1:])


# (a tensor's name after renaming, its shape) -> the parameters that it holds; None: one parameter of that name. The
# parameters' names depend only on the tensor's name. Each row belongs to exactly one parameter.
Split = Callable[[str, tuple[int, ...]], tuple[Target, ...] | None]


def targets_of(split: Split | None, name: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """The parameters that a tensor of this name and shape holds."""
    return (split and split(name, shape)) or (Target(name),)


def in_proportion(names: Mapping[str, int], shape: tuple[int, ...]) -> tuple[Target, ...]:
    """Concatenated parameters whose numbers of rows have these ratios: {"q": 1, "k": 1, "v": 1, "mlp": 4}. If the rows
    do not divide evenly, the remainder belongs to no parameter."""
    unit, targets, start = _rows(shape) // sum(names.values()), [], 0
    for name, number in names.items():
        targets.append(Target(name, (slice(start, start + number * unit),)))
        start += number * unit
    return tuple(targets)


def halves_exchanged(name: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """A parameter whose halves are swapped in the tensor. An odd last row belongs to no parameter."""
    half = _rows(shape) // 2
    return (Target(name, (slice(half, 2 * half), slice(0, half))),)


def row_faults(targets: tuple[Target, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(the fault, the rows and parameters it concerns), for parameters in a tensor of this shape."""
    rows = _rows(shape)
    every = (slice(0, rows),)
    taken = [(own.start, own.stop, one.name) for one in targets for own in (every if one.rows is None else one.rows)]
    done, last = 0, ""  # all rows before `done` are taken, the last one by the parameter `last`
    for start, stop, name in sorted(taken):
        assert 0 <= start <= stop, targets
        if start > done:
            yield "with rows that belong to no parameter", f"rows {done} to {start - 1}"
        if start < min(stop, done):
            yield "with rows that belong to two parameters", f"row {start} to {last} and {name}"
        if stop > done:
            done, last = stop, name
    if done < rows:
        yield "with rows that belong to no parameter", f"rows {done} to {rows - 1}"
    if done > rows:
        yield "with fewer rows than their parameters have", f"row {done - 1} of {last}"


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 0
