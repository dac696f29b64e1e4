"""Reads the scales of weights, and checks that they can be scales."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import coded_error
from ..formats.parts import Slices

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile

E8M0_NAN = 0xFF
BLOCK_ROWS, BLOCK_COLUMNS, LANES = 128, 4, 32  # of the blocks in which scales of groups lie


def checked(scales: Tensor, file: TensorFile, name: str, zero: bool = False) -> Tensor:
    """`scales`. Raises ValueError for one that is not finite, or not above 0 (zero: for one below 0)."""
    right = scales.isfinite() & ((scales >= 0) if zero else (scales > 0))
    if right.all():
        return scales
    wrong = scales[~right].flatten()[0].item()
    raise coded_error(
        "AV-1408",
        f"{file.path} has the scale {wrong} in {name}; it must be {'at least' if zero else 'above'} 0. Download it "
        "again.",
    )


def whole_scale(file: TensorFile, name: str) -> Tensor:
    """All numbers of a small tensor, in fp32."""
    return file.read(name).float()


def of_rows(file: TensorFile, name: str, rows: slice) -> Tensor:
    """The scales of these rows of a weight [rows, 1], or the scale of all of them [1, 1]; see `fits_rows`."""
    shape = file.stored_shapes[name]
    if math.prod(shape) == 1:
        return checked(whole_scale(file, name).view(1, 1), file, name)
    part = (rows, *(slice(0, 1) for _ in shape[1:]))
    return checked(file.read(name, part).float().view(-1, 1), file, name)


def fits_rows(scale: tuple[int, ...], weight: tuple[int, ...], flat: bool = False) -> bool:
    """Whether a scale of this shape is one number, or one for each row of a weight of that shape: [N, 1], or [N] if
    `flat`."""
    if math.prod(scale) == 1:
        return True
    return len(weight) > 1 and (scale == (weight[0], *(1 for _ in weight[1:])) or flat and scale == weight[:1])


def blocked_shape(rows: int, groups: int) -> tuple[int, int]:
    """The shape of a tensor that holds scales of groups [rows, groups] in blocks."""
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS, -(-groups // BLOCK_COLUMNS) * BLOCK_COLUMNS


def of_blocks(file: TensorFile, name: str, rows: slice, groups: slice) -> Tensor:
    """Some of the scales of groups [rows, groups], as bytes, which lie in blocks as cuBLAS reads them.

    A block has the scales of 128 rows and 4 groups: that of row r and group g is number 16 (r mod 32) + 4 (r div 32)
    + g (docs.nvidia.com/cuda/cublas, "1D Block Scaling Factors Layout"). A row of blocks is contiguous.
    """
    first, last = rows.start // BLOCK_ROWS, max(-(-rows.stop // BLOCK_ROWS), rows.start // BLOCK_ROWS)
    width = file.stored_shapes[name][1]
    held = file.read(name, (slice(first * BLOCK_ROWS, last * BLOCK_ROWS), slice(0, width))).view(torch.uint8)
    blocks = held.view(last - first, width // BLOCK_COLUMNS, LANES, BLOCK_ROWS // LANES, BLOCK_COLUMNS)
    scales = blocks.permute(0, 3, 2, 1, 4).reshape(-1, width)
    return scales[rows.start - first * BLOCK_ROWS : rows.stop - first * BLOCK_ROWS, groups]


def in_groups(numbers: Tensor, scales: Tensor) -> Tensor:
    """numbers [rows, columns] times the scales [rows, groups] of their groups."""
    return (numbers.unflatten(-1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def part_of_groups(part: Slices, size: int) -> tuple[slice, slice]:
    """The rows, and the groups of this size that a part covers, whose columns begin and end with groups."""
    rows, columns = part
    return rows, slice(columns.start // size, columns.stop // size)
