"""The layouts of ComfyUI's formats: which tensors a layer has, of which shapes and dtypes, and its weight's coding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...ops.mxfp8 import MX_GROUP
from ...ops.blocks.rotation import is_rotation
from .coding import Coding
from .fp8 import Scaled
from .integers import LEVEL_COUNT, Integers, Levels
from .marks import FormatMark
from .microscaled import NV_GROUP, MxWeight, NvWeight
from .scales import blocked_shape, fits_rows

FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
INT8_FORMAT, INT4_FORMAT, LEVELS_FORMAT = "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"
MX_FORMAT, NV_FORMAT = "mxfp8", "nvfp4"
SCALE_LEAF, INPUT_SCALE_LEAF = "weight_scale", "input_scale"
_GROUPS, _ROWS, _CODEBOOK = "weight_s_rel", "weight_s_channel", "weight_codebook"
_TENSOR_SCALE, _INPUTS = "weight_scale_2", "pre_quant_scale"
_ROTATION, _ROTATION_SIZE, _USUAL_ROTATION = "convrot", "convrot_groupsize", 256
_GROUP_SIZE, _USUAL_GROUP, _MOST_GROUP = "group_size", 16, 4096
_IN_INT8, _IN_BYTES = (torch.int8,), (torch.uint8,)
_IN_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_E4M3, _E8M0 = (torch.float8_e4m3fn, torch.uint8), (torch.float8_e8m0fnu, torch.uint8)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_Shape = tuple[int, ...]


class Further(NamedTuple):
    """What a further tensor of a layer must be. fits: whether a shape is right."""

    leaf: str
    fits: Callable[[_Shape], bool]
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    optional: bool = False


class MarkedLayer(NamedTuple):
    """A layer to read. shape: of its weight's numbers [N, K], or [N, ...] in fp8. scale: its scale's name without the
    layer's. held: the leaves of its tensors."""

    name: str
    mark: FormatMark
    shape: _Shape
    scale: str
    held: frozenset[str]

    def key(self, leaf: str) -> str:
        return f"{self.name}.{leaf}"

    def key_if(self, leaf: str) -> str | None:
        return self.key(leaf) if leaf in self.held else None


@dataclass(frozen=True)
class WeightLayout:
    """dtypes: of the weight. coding: makes that of a layer's weight. further: what its other tensors must be, its scale
    first. pairs: whether a byte holds two numbers."""

    dtypes: tuple[torch.dtype, ...]
    coding: Callable[[MarkedLayer], Coding]
    further: Callable[[MarkedLayer], Iterator[Further]]
    pairs: bool = False

    def shape(self, stored: _Shape) -> _Shape:
        """The shape of the numbers."""
        return (*stored[:-1], 2 * stored[-1]) if self.pairs and stored else stored


def rotation_of(mark: FormatMark) -> int:
    """The size of the groups of inputs that a layer rotates; 0: none; -1: its mark has no valid size."""
    if mark.format == INT8_FORMAT and not mark.setting(_ROTATION, False):
        return 0
    size = mark.number(_ROTATION_SIZE, _USUAL_ROTATION)
    return size if is_rotation(size) else -1


def group_size_of(mark: FormatMark) -> int:
    """The number of inputs that share a scale in LEVELS_FORMAT; -1: its mark has no valid one."""
    size = mark.number(_GROUP_SIZE, _USUAL_GROUP)
    return size if 4 <= size <= _MOST_GROUP else -1


def has_whole_groups(given: MarkedLayer, coding: Coding) -> bool:
    """Whether the layer's inputs are whole groups of its mark."""
    return coding.grain == 1 or len(given.shape) == 2 and given.shape[1] % coding.grain == 0


def is_valid(mark: FormatMark) -> bool:
    """Whether the sizes in a mark can be."""
    return (mark.format not in (INT8_FORMAT, INT4_FORMAT, LEVELS_FORMAT) or rotation_of(mark) >= 0) and (
        mark.format != LEVELS_FORMAT or group_size_of(mark) > 0
    )


def _row_scale(given: MarkedLayer, flat: bool = False) -> Iterator[Further]:
    yield Further(given.scale, partial(fits_rows, weight=given.shape, flat=flat))


def _integers(given: MarkedLayer, packed: bool = False) -> Integers:
    return Integers(given.key(given.scale), rotation_of(given.mark), packed)


def _levels(given: MarkedLayer) -> Levels:
    rotation, size = rotation_of(given.mark), group_size_of(given.mark)
    return Levels(given.key(_ROWS), rotation, True, given.key_if(_CODEBOOK), given.key(_GROUPS), size)


def _of_levels(given: MarkedLayer) -> Iterator[Further]:
    rows, width = given.shape
    yield Further(_ROWS, (rows,).__eq__)
    yield Further(_GROUPS, (rows, width // group_size_of(given.mark)).__eq__, (*_E4M3, torch.float32))
    yield Further(_CODEBOOK, (LEVEL_COUNT,).__eq__, optional=True)


def _of_mxfp8(given: MarkedLayer) -> Iterator[Further]:
    yield Further(SCALE_LEAF, blocked_shape(given.shape[0], given.shape[1] // MX_GROUP).__eq__, _E8M0)


def _of_nvfp4(given: MarkedLayer) -> Iterator[Further]:
    rows, width = given.shape
    yield Further(SCALE_LEAF, blocked_shape(rows, width // NV_GROUP).__eq__, _E4M3)
    yield Further(_TENSOR_SCALE, lambda shape: math.prod(shape) == 1)
    yield Further(_INPUTS, (width,).__eq__, optional=True)


LAYOUT_OF_FORMAT: dict[str, WeightLayout] = {
    **dict.fromkeys(FP8_FORMATS, WeightLayout(_IN_FP8, lambda given: Scaled(given.key(given.scale)), _row_scale)),
    INT8_FORMAT: WeightLayout(_IN_INT8, _integers, partial(_row_scale, flat=True)),
    INT4_FORMAT: WeightLayout(_IN_INT8, partial(_integers, packed=True), partial(_row_scale, flat=True), pairs=True),
    LEVELS_FORMAT: WeightLayout(_IN_INT8, _levels, _of_levels, pairs=True),
    MX_FORMAT: WeightLayout((torch.float8_e4m3fn,), lambda given: MxWeight(given.key(SCALE_LEAF)), _of_mxfp8),
    NV_FORMAT: WeightLayout(
        _IN_BYTES,
        lambda given: NvWeight(given.key(SCALE_LEAF), given.key(_TENSOR_SCALE), given.key_if(_INPUTS)),
        _of_nvfp4,
        pairs=True,
    ),
}
INTEGER_FORMATS = (INT8_FORMAT, INT4_FORMAT, LEVELS_FORMAT)


def row_scale_leaf(mark: FormatMark) -> str:
    """The leaf of the scales of the rows of a weight in integers."""
    return _ROWS if mark.format == LEVELS_FORMAT else SCALE_LEAF
