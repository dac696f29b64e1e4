"""Maps tensors on disk to parameters: a tensor may hold several parameters, or one with its rows in another order.

A fused layer concatenates the rows of query, key and value (and possibly more), which read the same input. A layer that
reads two concatenated inputs may be two matrices in the network, each with some of its columns. A modulation may have
its halves swapped: scale | shift, where the network has shift | scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Rows = tuple[slice, ...]  # ranges of a tensor's rows (dim 0), concatenated in this order; none with a step
# Tensors of a quantized layer (see checkpoints.msmodelslim) that depend on its inputs only, on its outputs only, and
# whose last dim is the outputs (the first may be steps).
OF_INPUTS, OF_OUTPUTS = ("input_scale", "input_offset", "mul_scale"), ("weight_scale", "weight_offset", "deq_scale")
OUTPUTS_LAST = ("deq_scale", "quant_bias")
ADDED = ("bias", "quant_bias")  # what is added to a layer's products


def row_count(rows: Rows) -> int:
    """The number of rows in these ranges."""
    return sum(own.stop - own.start for own in rows)


@dataclass(frozen=True)
class Target:
    """A parameter that a tensor holds.

    rows: its ranges of the tensor's rows, in the parameter's order; None: all. columns: its range of the tensor's
    columns (dim 1); None: all. shared: whether other parameters have the same numbers, such as a scale of both. flat:
    whether it is a matrix, which may lie there as the weight of a convolution of size 1, [out, in, 1, 1, 1].
    """

    name: str
    rows: Rows | None = None
    columns: slice | None = None
    shared: bool = False
    flat: bool = False

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, given the tensor's shape."""
        shape = shape[:2] if self.flat and set(shape[2:]) == {1} else shape
        shape = shape if self.rows is None else (row_count(self.rows), *shape[1:])
        return shape if self.columns is None else (*shape[:1], self.columns.stop - self.columns.start, *shape[2:])

    def has_whole_groups(self, size: int) -> bool:
        """Whether its columns are whole groups of this number of the tensor's columns."""
        return self.columns is None or self.columns.start % size == self.columns.stop % size == 0


# (a tensor's name after renaming, its shape) -> the parameters that it holds; None: one parameter of that name. The
# parameters' names depend only on the tensor's name. Each number belongs to exactly one parameter, or is shared.
Split = Callable[[str, tuple[int, ...]], tuple[Target, ...] | None]


def targets_of(split: Split | None, name: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """The parameters that a tensor of this name and shape holds."""
    return (split and split(name, shape)) or (Target(name),)


def in_proportion(names: Mapping[str, int], shape: tuple[int, ...]) -> tuple[Target, ...]:
    """Concatenated parameters whose numbers of rows have these ratios: {"q": 1, "k": 1, "v": 1, "mlp": 4}. If the rows
    do not divide evenly, the remainder belongs to no parameter."""
    return tuple(Target(name, (part,)) for name, part in _proportions(names, _rows(shape)))


def columns_in_proportion(names: Mapping[str, int], shape: tuple[int, ...]) -> tuple[Target, ...]:
    """The same for columns."""
    return tuple(Target(name, columns=part) for name, part in _proportions(names, _columns(shape)))


def _proportions(names: Mapping[str, int], length: int) -> Iterator[tuple[str, slice]]:
    unit, start = length // sum(names.values()), 0
    for name, number in names.items():
        yield name, slice(start, start + number * unit)
        start += number * unit


def layers_of_one_input(layers: Mapping[str, int], leaf: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """The parameters `leaf` of layers that read the same input, in a tensor of the layer that concatenates their
    outputs, which may be quantized. layers: their names, with the ratios of their outputs."""
    names = {f"{layer}.{leaf}": number for layer, number in layers.items()}
    if leaf in OF_INPUTS:
        return tuple(Target(name, shared=True) for name in names)
    if leaf in OUTPUTS_LAST and len(shape) > 1:
        return columns_in_proportion(names, shape)
    return in_proportion(names, shape)


def layers_of_joined_inputs(layers: Mapping[str, int], leaf: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """The parameters `leaf` of layers whose outputs are added, in a tensor of the layer that reads their inputs
    concatenated, which may be quantized. layers: their names, with the ratios of their inputs; only the last one has a
    bias."""
    names = {f"{layer}.{leaf}": number for layer, number in layers.items()}
    if leaf in ADDED:
        return (Target([*names][-1]),)
    if leaf == "mul_scale":
        return in_proportion(names, shape)
    if leaf in OF_INPUTS or leaf in OF_OUTPUTS and (leaf == "deq_scale" or _columns(shape) < 2):
        return tuple(Target(name, shared=True) for name in names)
    return columns_in_proportion(names, shape)


def halves_exchanged(name: str, shape: tuple[int, ...]) -> tuple[Target, ...]:
    """A parameter whose halves are swapped in the tensor. An odd last row belongs to no parameter."""
    half = _rows(shape) // 2
    return (Target(name, (slice(half, 2 * half), slice(0, half))),)


def row_faults(targets: tuple[Target, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(the fault, the rows or columns and parameters it concerns), for parameters in a tensor of this shape."""
    targets = tuple(one for one in targets if not one.shared)
    if all(one.columns is None for one in targets):
        yield from _faults_in(targets, _rows(shape)) if targets else ()
        return
    width = _columns(shape)
    taken = [(one, slice(0, width) if one.columns is None else one.columns) for one in targets]
    edges = sorted({0, width, *(edge for _, own in taken for edge in (own.start, own.stop))})
    for start, stop in zip(edges, edges[1:]):
        own = tuple(one for one, columns in taken if columns.start <= start < columns.stop)
        if start >= width:
            yield "with fewer columns than their parameters have", f"column {stop - 1} of {own[-1].name}"
        elif own:
            yield from _faults_in(own, _rows(shape))
        else:
            yield "with columns that belong to no parameter", f"columns {start} to {stop - 1}"


def _faults_in(targets: tuple[Target, ...], rows: int) -> Iterator[tuple[str, str]]:
    """The faults in columns that these parameters have."""
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


def _columns(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 0
