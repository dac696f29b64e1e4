"""Changes that depend on the weight W that they change, so that a rank needs more of it than the part that it holds.

    DoRA   W + strength * (m * (W + D) / |W + D| - W)     Liu et al., arXiv 2402.09353

D is the change of a low-rank pair, LoHa or LoKr, without the strength, and |.| the norm of each output's row, or of
each input's column: the magnitude m has one number for each output, or one for each input. The strength interpolates,
as in ComfyUI (comfy/weight_adapter/base.py, weight_decompose). There, a `dora_scale` for outputs is divided by the norm
of W itself, without D. PEFT's `lora_magnitude_vector` is divided by that of W + D (peft/tuners/lora/dora.py), as in the
paper.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...checkpoints.formats.parts import Slices, by_rows, full_slices, in_ranges
from ...checkpoints.formats.tensor_file import TensorFile
from ...checkpoints.fused import Rows, Target
from ...models.shapes import Shapes
from .changes import Shape, WeightChange

CHUNK_BYTES = 64 * 2**20  # of a weight in fp32 whose norms are computed at once

# Gets a part of the layer in the file as it is before the change, in fp32, in a new tensor.
Before = Callable[[Slices], Tensor]


class Dependent(WeightChange):
    """parts: the parameters that the layer in the file holds."""

    parts: tuple[Target, ...]

    @property
    def depends(self) -> bool:
        return True

    @abstractmethod
    def summary(self, before: Before, file: TensorFile, part: Slices, whole: Shape) -> Tensor:
        """What the change of the slices `part` of a parameter of the shape `whole` needs to know about the rest of the
        layer. Small, and independent of the strength."""

    @abstractmethod
    def apply(
        self, weight: Tensor, summary: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float
    ) -> None:
        """Changes `weight` in place, as `add_to`."""

    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float) -> None:
        raise TypeError(f"{type(self).__name__} depends on the weight: call `summary` and `apply`")


@dataclass(frozen=True)
class Decomposed(Dependent):
    """DoRA. inner: the change D. magnitude: the key of m: [out], [out, 1] or [1, out, 1, ...] of outputs, [1, in] of
    inputs, with further dims of size 1. of_sum: whether norms for outputs are those of W + D, not of W."""

    inner: WeightChange
    magnitude: str
    of_sum: bool
    scale: float = 1.0
    rows: Rows | None = None
    columns: slice | None = None
    parts: tuple[Target, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.inner.keys, self.magnitude)

    @property
    def rank_key(self) -> str | None:
        return self.inner.rank_key

    @property
    def changes_nothing(self) -> bool:
        return False

    def layer(self, on_disk: Shapes) -> Shape | None:
        return self.inner.layer(on_disk)

    def fits(self, on_disk: Shapes, whole: Shape) -> bool:
        own = replace(self.inner, rows=self.rows, columns=self.columns)
        return own.fits(on_disk, whole) and self._dim(on_disk, self._whole(on_disk, whole)) is not None

    def summary(self, before: Before, file: TensorFile, part: Slices, whole: Shape) -> Tensor:
        """m / the norms, which broadcasts to the part."""
        whole = self._whole(file.shapes, whole)
        dim = self._dim(file.shapes, whole)
        pieces = [lies for _, lies in in_ranges(part, self.rows, self.columns)]
        if dim == 1:  # the same columns in all pieces, and all rows
            columns = pieces[0][1]
            squares = sum(x.sum(0) for x in self._squares(before, file, (full_slices(whole)[0], columns), whole))
            norms, magnitude = squares[None].sqrt(), file.read(self.magnitude).flatten()[None, columns]
        else:
            rows = [piece[0] for piece in pieces]
            squares = [x.sum(1) for own in rows
                       for x in self._squares(before, file, (own, full_slices(whole)[1]), whole)]  # fmt: skip
            norms = torch.cat(squares)[:, None].sqrt()
            magnitude = torch.cat([file.read(self.magnitude).flatten()[own] for own in rows])[:, None]
        factors = magnitude.to(norms) / (norms + torch.finfo(torch.float32).eps)
        return factors.view(*factors.shape, *(1 for _ in whole[2:]))

    def apply(
        self, weight: Tensor, summary: Tensor, file: TensorFile, part: Slices, whole: Shape, strength: float
    ) -> None:
        changed = weight.clone()
        self._own(self.rows, self.columns).add_to(changed, file, part, whole, 1.0)
        weight.lerp_(changed.mul_(summary.to(weight)), strength)

    def _squares(self, before: Before, file: TensorFile, lies: Slices, whole: Shape) -> Iterator[Tensor]:
        """The sums over the kernel of the squares of these rows and columns of the layer, [rows, columns], in chunks of
        rows."""
        lies = (*lies, *full_slices(whole)[2:])
        with_change = self.of_sum or self._dim(file.shapes, whole) == 1
        for chunk in by_rows(lies, 4, CHUNK_BYTES):
            made = before(chunk)
            if with_change:
                self._own(None, None).add_to(made, file, chunk, whole, 1.0)
            yield made.square_().flatten(2).sum(2) if made.ndim > 2 else made.square_()

    def _own(self, rows: Rows | None, columns: slice | None) -> WeightChange:
        return replace(self.inner, scale=self.scale, rows=rows, columns=columns)

    def _whole(self, on_disk: Shapes, whole: Shape) -> Shape:
        """The shape of the layer in the file, with its kernel. whole: that of the parameter."""
        if self.rows is self.columns is None:
            return whole
        rows, *columns = self.layer(on_disk)
        return rows, math.prod(columns) // math.prod(whole[2:]), *whole[2:]

    def _dim(self, on_disk: Shapes, whole: Shape) -> int | None:
        """0: m has a number for each output of a layer of this shape, 1: for each input; None: it does not fit."""
        shape = on_disk[self.magnitude]
        if not shape or math.prod(shape) not in whole[:2]:
            return None
        if shape[0] == whole[0] or self.of_sum:
            return 0 if math.prod(shape) == whole[0] else None
        return 1 if shape[:2] == (1, whole[1]) else None
