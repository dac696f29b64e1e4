"""Tensors on disk that hold several parameters in ranges of their rows, or one parameter in another order of its rows.

A fused layer has the rows of its queries, keys and values (and perhaps more) one after the other; a modulation may have
its two halves exchanged: scale | shift, where the network has shift | scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Rows = tuple[slice, ...]  # ranges of a tensor's rows (dim 0), joined in this order; none with a step


def count(rows: Rows) -> int:
    """The number of rows in these ranges."""
    return sum(own.stop - own.start for own in rows)


@dataclass(frozen=True)
class Target:
    """A parameter that a tensor holds. rows: the ranges of the tensor's rows that make it up, in the parameter's order;
    None: all rows."""

    name: str
    rows: Rows | None = None

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, in a tensor of this shape."""
        return shape if self.rows is None else (count(self.rows), *shape[1:])


# Which parameters a tensor holds, by its name, as the file's names are renamed, and by its shape; None: one, of that
# name. The parameters' names depend on the tensor's name only. Each row belongs to one parameter.
Split = Callable[[str, tuple[int, ...]], tuple[Target, ...] | None]


def targets_of(split: Split | None, name: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """The parameters that a tensor of this name and shape holds."""
    return (split and split(name, shape)) or (Target(name),)


def in_proportion(names: Mapping[str, int], shape: tuple[int, ...]) -> tuple[Target, ...]:
    """Parameters whose rows lie one after the other, and are to one another as these numbers: {"q": 1, "k": 1, "v": 1,
    "mlp": 4}. Rows that are left over where the tensor's do not divide belong to none."""
    unit, targets, start = _rows(shape) // sum(names.values()), [], 0
    for name, number in names.items():
        targets.append(Target(name, (slice(start, start + number * unit),)))
        start += number * unit
    return tuple(targets)


def halves_exchanged(name: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """A parameter whose first half of rows is the second half of the tensor's. An odd row belongs to none."""
    half = _rows(shape) // 2
    return (Target(name, (slice(half, 2 * half), slice(0, half))),)


def row_faults(targets: tuple[Target, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(what is wrong with the rows that parameters take of a tensor of this shape, which rows and parameters)"""
    rows = _rows(shape)
    every = (slice(0, rows),)
    taken = [(own.start, own.stop, one.name) for one in targets for own in (every if one.rows is None else one.rows)]
    done, last = 0, ""  # up to which row all are taken; by whom the last one
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
