"""What the tensors of a LoRA file add to a parameter W, by the formula of their format; all times strength * scale.

    low-rank pair  B @ A                                Hu et al., arXiv 2106.09685
    LoHa           (A1 @ B1) * (A2 @ B2), elementwise   Hyeon-Woo et al., arXiv 2108.06098
    LoKr           kron(C1, C2)                         Yeh et al., arXiv 2309.14859; each factor whole, or A @ B
    difference     D

The first three may be in Tucker form, for convolutions: a core T [rank, rank, kernel] between the two matrices (Yeh et
al., and the library LyCORIS). Factors of a convolution that are flat [out, in * kernel] are reshaped to the weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoints.formats.parts import Slices, full_slices, in_ranges
from ...checkpoints.formats.tensor_file import TensorFile
from ...checkpoints.fused import Rows, Target
from ...models.shapes import Shapes

Shape = tuple[int, ...]
MAX_RANK = 16_384  # above the width of any published model, which bounds the rank of a change


class WeightChange(ABC):
    """A change of one parameter.

    scale: alpha / rank. rows, columns: of the layer in the file that belong to the parameter, if that layer holds
    several parameters; None: all.
    """

    scale: float
    rows: Rows | None
    columns: slice | None

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Its tensors in the file."""

    @property
    def rank_key(self) -> str | None:
        """The tensor whose first dim is the rank; None: the change has no scale of its own."""
        return None

    @property
    def changes_nothing(self) -> bool:
        return self.scale == 0

    @property
    def depends(self) -> bool:
        """Whether it depends on the weight that it changes (see dependent.py), and so is no sum that can be added."""
        return False

    def rank(self, on_disk: Shapes) -> int | None:
        """The rank of `factors`; None: the change is no product of two matrices."""
        return None

    def factors(self, file: TensorFile, part: Slices, whole: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        """(B [rows, rank], A [rank, columns]), whose product times the scale is the change of the slices `part`, on the
        device of `like` and in its dtype. whole: the parameter's shape. Only if there is a `rank`."""
        raise TypeError(f"{type(self).__name__} is no product of two matrices")

    @abstractmethod
    def layer(self, on_disk: Shapes) -> Shape | None:
        """The shape of the layer in the file; None if the tensors do not fit together. A kernel may be in one dim with
        the inputs."""

    def shape(self, on_disk: Shapes) -> Shape:
        """The shape of the parameter, given that its tensors fit together."""
        return Target("", self.rows, self.columns).shape_in(self.layer(on_disk))

    def fits(self, on_disk: Shapes, whole: Shape) -> bool:
        """Whether it can be added to a parameter of this shape."""
        rows, *columns = self.shape(on_disk)
        return len(whole) > 1 and (rows, math.prod(columns)) == (whole[0], math.prod(whole[1:]))

    @abstractmethod
    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float) -> None:
        """Adds the change to `weight` in place: in fp32, the slices `part` of a parameter of the shape `whole`."""


@dataclass(frozen=True)
class LowRank(WeightChange):
    """up: the key of B [out, rank]; down: the key of A [rank, in]; those of a convolution have more dims. mid: the key
    of the core of a Tucker form."""

    up: str
    down: str
    scale: float = 1.0
    rows: Rows | None = None
    columns: slice | None = None
    mid: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.up, self.down) if self.mid is None else (self.up, self.down, self.mid)

    @property
    def rank_key(self) -> str | None:
        return self.down

    def layer(self, on_disk: Shapes) -> Shape | None:
        up, down = on_disk[self.up], on_disk[self.down]
        if not up or not down or self.mid is None and math.prod(up[1:]) != down[0]:
            return None
        if self.mid is None:
            return up[0], *down[1:]
        return _tucker_shape((math.prod(up[1:]), up[0]), (down[0], math.prod(down[1:])), on_disk[self.mid])

    def fits(self, on_disk: Shapes, whole: Shape) -> bool:
        up, down = on_disk[self.up], on_disk[self.down]
        return min(len(up), len(down)) > 1 and down[0] <= MAX_RANK and super().fits(on_disk, whole)

    def rank(self, on_disk: Shapes) -> int:
        return math.prod(on_disk[self.up][1:])

    def factors(self, file: TensorFile, part: Slices, whole: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        up = _read(file, self.up, part[:1], self.rows).flatten(1).to(like)
        down = _read(file, self.down, (), None, self.columns)
        if self.mid is not None:
            down = torch.einsum("m n ..., n j -> m j ...", file.read(self.mid).to(like), down.flatten(1).to(like))
        down = down.view(-1, *whole[1:])
        return up, down[(slice(None), *part[1:])].flatten(1).to(like)

    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float) -> None:
        up, down = self.factors(file, part, whole, weight)
        weight += ((strength * self.scale) * (up @ down)).view_as(weight)


@dataclass(frozen=True)
class Difference(WeightChange):
    """A full difference of a parameter."""

    key: str
    scale: float = 1.0
    rows: Rows | None = None
    columns: slice | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def changes_nothing(self) -> bool:
        return False  # a bias whose scale is 0 goes with a weight that is named already

    def layer(self, on_disk: Shapes) -> Shape | None:
        return on_disk[self.key]

    def fits(self, on_disk: Shapes, whole: Shape) -> bool:
        return self.shape(on_disk) == whole

    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float) -> None:
        weight += (strength * self.scale) * _read(file, self.key, part, self.rows, self.columns).to(weight)


class _Product(WeightChange):
    """A change that is computed for some rows of the layer in the file, in all columns."""

    @abstractmethod
    def made(self, file: TensorFile, rows: slice, like: Tensor) -> Tensor:
        """These rows, not scaled, on the device of `like` and in its dtype; the other dims in any shape."""

    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float) -> None:
        made = []
        for _, lies in in_ranges(part, self.rows, self.columns):
            rows = self.made(file, lies[0], weight)
            inner = math.prod(self.layer(file.shapes)[1:]) // math.prod(whole[2:])
            made.append(rows.reshape(len(rows), inner, *whole[2:])[(slice(None), *lies[1:])])
        weight += (strength * self.scale) * torch.cat(made).view_as(weight)


@dataclass(frozen=True)
class Hadamard(_Product):
    """LoHa: the keys of A1 [out, rank], B1 [rank, in], A2, B2; with cores A is [rank, out]."""

    first: tuple[str, str]
    second: tuple[str, str]
    scale: float = 1.0
    cores: tuple[str, str] | None = None
    rows: Rows | None = None
    columns: slice | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.first, *self.second, *(self.cores or ()))

    @property
    def rank_key(self) -> str | None:
        return self.first[1]

    def layer(self, on_disk: Shapes) -> Shape | None:
        one, other = (_product_shape(*pair, core, on_disk) for pair, core in self._factors())
        return one if one == other else None

    def made(self, file: TensorFile, rows: slice, like: Tensor) -> Tensor:
        one, other = (_multiplied(*pair, core, file, rows, like) for pair, core in self._factors())
        return one * other

    def rank(self, on_disk: Shapes) -> int | None:
        return None if self.cores else on_disk[self.first[1]][0] * on_disk[self.second[1]][0]

    def factors(self, file: TensorFile, part: Slices, whole: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        """The elementwise product of B1 A1 and B2 A2 has a column of B for each pair of their columns."""
        (a1, b1), (a2, b2) = ([file.read(key).to(like) for key in pair] for pair in (self.first, self.second))
        pieces = [lies for _, lies in in_ranges(part, self.rows, self.columns)]
        up = [(a1[own, :, None] * a2[own, None, :]).flatten(1) for own, *_ in pieces]
        inner = pieces[0][1]
        return torch.cat(up), (b1[:, None, inner] * b2[None, :, inner]).flatten(0, 1)

    def _factors(self) -> list[tuple[tuple[str, str], str | None]]:
        return [*zip((self.first, self.second), self.cores or (None, None))]


@dataclass(frozen=True)
class Kronecker(_Product):
    """LoKr: the keys of C1 [out1, in1] and of C2 [out2, in2] or [out2, in2, kernel]; one key of a whole factor, or two
    whose product it is. core: of a Tucker form of C2, whose A is then [rank, out2]."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scale: float = 1.0
    core: str | None = None
    rows: Rows | None = None
    columns: slice | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.first, *self.second, *((self.core,) if self.core else ()))

    @property
    def rank_key(self) -> str | None:
        """None if both factors are whole: then LyCORIS applies no alpha."""
        return next((factor[1] for factor in (self.second, self.first) if len(factor) == 2), None)

    def layer(self, on_disk: Shapes) -> Shape | None:
        one, other = _factor_shape(self.first, None, on_disk), _factor_shape(self.second, self.core, on_disk)
        if one is None or other is None or len(one) != 2:
            return None
        return one[0] * other[0], one[1] * other[1], *other[2:]

    def cut(self, on_disk: Shapes, part: Slices) -> tuple[Slices, Slices] | None:
        """The slices of C1 and C2 whose kron the change of the slices `part` of a matrix is; None: there are none."""
        other, pieces = _factor_shape(self.second, self.core, on_disk), in_ranges(part, self.rows, self.columns)
        if len(pieces) > 1 or len(other) != 2 or len(part) != 2:
            return None
        both = [_in_units(own, unit) for own, unit in zip(pieces[0][1], other)]
        return None if None in both else tuple(zip(*both))

    def matrices(self, file: TensorFile, cut: tuple[Slices, Slices], like: Tensor) -> tuple[Tensor, Tensor]:
        """These slices of C1 and C2."""
        one, other = _factor(self.first, None, file, like), _factor(self.second, self.core, file, like)
        return one[cut[0]], other[cut[1]]

    def made(self, file: TensorFile, rows: slice, like: Tensor) -> Tensor:
        """The rows of kron(C1, C2) are those of C2, times each row of C1."""
        one, other = _factor(self.first, None, file, like), _factor(self.second, self.core, file, like)
        each = len(other)
        used = slice(rows.start // each, -(-rows.stop // each))
        # Each element of C1 multiplies all of C2, with its kernel, as in LyCORIS; torch.kron aligns the last dims.
        made = torch.kron(one[(used, ..., *(None for _ in other.shape[2:]))], other.contiguous())
        return made[rows.start - used.start * each : rows.stop - used.start * each]


def _in_units(own: slice, unit: int) -> tuple[slice, slice] | None:
    """(the units, the part of each) that these rows are: whole units, or a part of one; None: they are neither."""
    first, last = own.start // unit, -(-own.stop // unit)
    if own.start % unit == own.stop % unit == 0:
        return slice(first, last), slice(0, unit)
    return (slice(first, last), slice(own.start - first * unit, own.stop - first * unit)) if last - first == 1 else None


def _read(file: TensorFile, key: str, part: Slices, rows: Rows | None, columns: slice | None = None) -> Tensor:
    """The slices `part` of the tensor that these rows and columns make. part: of the first dims; the others are
    whole."""
    shape = Target(key, rows, columns).shape_in(file.shapes[key])
    part = (*part, *full_slices(shape)[len(part) :])
    pieces = [file.read(key, lies) for _, lies in in_ranges(part, rows, columns)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _tucker_shape(left: Shape, right: Shape, core: Shape) -> Shape | None:
    """The shape of the product of left [m, out], core [m, n, kernel] and right [n, in]; None if they do not fit."""
    if len(left) != 2 or len(right) != 2 or core[:2] != (left[0], right[0]) or max(core[:2]) > MAX_RANK:
        return None
    return left[1], right[1], *core[2:]


def _product_shape(a: str, b: str, core: str | None, on_disk: Shapes) -> Shape | None:
    left, right = on_disk[a], on_disk[b]
    if core is not None:
        return _tucker_shape(left, right, on_disk[core])
    if len(left) != 2 or len(right) != 2 or not left[1] == right[0] <= MAX_RANK:
        return None
    return left[0], right[1]


def _multiplied(a: str, b: str, core: str | None, file: TensorFile, rows: slice | None, like: Tensor) -> Tensor:
    """Rows (None: all) of A @ B, or of the product with a core."""
    left, right = file.read(a), file.read(b).to(like)
    if core is None:
        return (left if rows is None else left[rows]).to(like) @ right
    left = left if rows is None else left[:, rows]
    made = torch.einsum("m n ..., n j, m i -> i j ...", file.read(core).to(like), right, left.to(like))
    return made if rows is None else made.flatten(1)


def _factor_shape(keys: tuple[str, ...], core: str | None, on_disk: Shapes) -> Shape | None:
    if len(keys) == 2:
        return _product_shape(*keys, core, on_disk)
    shape = on_disk[keys[0]]
    return shape if len(shape) > 1 and core is None else None


def _factor(keys: tuple[str, ...], core: str | None, file: TensorFile, like: Tensor) -> Tensor:
    return _multiplied(*keys, core, file, None, like) if len(keys) == 2 else file.read(keys[0]).to(like)
