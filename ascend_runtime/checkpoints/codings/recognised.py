"""Finds how the weights of a file are stored: by its marks, or, in LightX2V's files, by their scales.

Scales of inputs are for products in fewer bits with fixed scales of activations, which are not used here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from ...errors import coded_error
from ...ops.mxfp8 import groups_of
from ..faults import list_faults, shown
from .coding import Coding, Codings
from .fp8 import is_8_bits
from .layouts import (
    FP8_FORMATS,
    INPUT_SCALE_LEAF,
    INT8_FORMAT,
    INTEGER_FORMATS,
    LAYOUT_OF_FORMAT,
    MX_FORMAT,
    SCALE_LEAF,
    MarkedLayer,
    has_whole_groups,
    is_valid,
    row_scale_leaf,
)
from .marks import LAYER_MARK, OLD_MARK, FormatMark, has_old_mark, marks_of
from .scales import fits_rows

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile

OLD_SCALE, OLD_INPUT_SCALE = "scale_weight", "scale_input"
NO_SCALE, STRANGE_SCALE = "without a scale", "that are not a scale"
OTHER_BITS, OTHER_DTYPE = "with a scale, but not in 8 bits", "in another dtype than their mark says"
NO_WEIGHT = "that are marked, but missing"
NO_GROUPS = "whose inputs are not whole groups of their mark"
Faults = dict[str, list[str]]


def codings_of(file: TensorFile, own: list[str]) -> Codings:
    """How the weights among the tensors `own` of a file are stored.

    Both fields are empty if the file has no mark. Raises ValueError for an unsupported format or an invalid mark; lists
    weights without valid scales.
    """
    found = all_marks(file, own)
    for layer, mark in found.items():
        if mark.format not in LAYOUT_OF_FORMAT:
            held = f"{shown(layer)} as {shown(mark.format)}"
            raise coded_error("AV-1305", f"{file.path} holds {held}. Use the model's fp8_scaled, fp16 or bf16 form.")
    faults: Faults = defaultdict(list)
    marking = {OLD_MARK, LAYER_MARK, *((OLD_SCALE, OLD_INPUT_SCALE) if has_old_mark(own) else ())}
    weights, others = {}, {name for name in own if name.rpartition(".")[2] in marking}
    leaves = _leaves_of(own)
    for layer, mark in found.items():
        given = _given(file, layer, mark, leaves.get(layer, frozenset()))
        coding = _coding(file, given, faults)
        if coding is not None:
            weights[given.key("weight")] = coding
        others |= {given.key(leaf) for leaf in _further_leaves(given) if leaf in given.held}
    if any(faults.values()):
        raise coded_error(
            "AV-1408",
            f"{file.path} is marked as {_named(found)}. Tensors {list_faults(faults)}. Download it again, or use its "
            "fp16 or bf16 form.",
        )
    return Codings(weights, others)


def all_marks(file: TensorFile, own: list[str]) -> dict[str, FormatMark]:
    """The marks of all layers among the tensors `own`, also of those that only their tensors mark, by the layers' names
    in the file."""
    found = marks_of(file, own)
    names = [(name, *name.rpartition(".")[::2]) for name in own]
    old = {
        layer for name, layer, leaf in names
        if leaf == OLD_SCALE or leaf == "weight" and is_8_bits(file.dtype(name))
    } if has_old_mark(own) else set()  # fmt: skip
    found = {**dict.fromkeys(sorted(old - found.keys()), FormatMark(FP8_FORMATS[0])), **found}
    scaled = [layer for _, layer, leaf in names if leaf == SCALE_LEAF and layer not in found]
    marked = bool(found)
    return found | {layer: mark for layer in scaled if (mark := _unmarked(file, layer, marked))}


def logical_shapes(file: TensorFile) -> dict[str, tuple[int, ...]]:
    """The shapes of the numbers of marked weights and of their scales, where the tensors in the file have others: two
    numbers in a byte, one scale of all rows, or exponents in blocks."""
    shapes = {}
    for layer, mark in marks_of(file, file.shapes).items():
        stored = file.stored_shapes.get(f"{layer}.weight", ())
        if len(stored) != 2 or mark.format not in LAYOUT_OF_FORMAT:
            continue
        shapes[f"{layer}.weight"] = LAYOUT_OF_FORMAT[mark.format].shape(stored)
        scale = f"{layer}.{row_scale_leaf(mark)}"
        if mark.format == MX_FORMAT and scale in file.stored_shapes:
            shapes[scale] = (stored[0], groups_of(stored[1]))
        if mark.format in INTEGER_FORMATS and fits_rows(file.stored_shapes.get(scale, (0,)), stored, flat=True):
            shapes[scale] = (stored[0], 1)
    return shapes


def _unmarked(file: TensorFile, layer: str, marked: bool) -> FormatMark | None:
    """The mark that a layer's tensors stand for; None: its scale stands for none. marked: whether the file has marks.

    Raises ValueError for scales in fewer bits, or of other groups than rows: other layouts of LightX2V.
    """
    if marked:
        return FormatMark(FP8_FORMATS[0])
    weight, scale = f"{layer}.weight", f"{layer}.{SCALE_LEAF}"
    stored, scales = file.stored_shapes.get(weight), file.stored_shapes[scale]
    if stored is None or math.prod(scales) == 1 or (held := file.dtype(weight)).itemsize > 1:
        return None
    of = file.dtype(scale)
    if fits_rows(scales, stored) and of.is_floating_point and of.itemsize > 1 and held != torch.uint8:
        return FormatMark(INT8_FORMAT if held == torch.int8 else FP8_FORMATS[0])
    raise coded_error(
        "AV-1305",
        f"{file.path} holds weights without a mark, such as {weight} {list(stored)} as {_plain(held)} with the scales "
        f"{list(scales)} as {_plain(of)}. Without a mark, only int8 and fp8 weights with one scale for each row are "
        "read, as LightX2V writes them. Use the model's int8, fp8_scaled, fp16 or bf16 form.",
    )


def _leaves_of(names: list[str]) -> dict[str, frozenset[str]]:
    """The leaves of the tensors of each layer."""
    leaves = defaultdict(set)
    for name in names:
        layer, _, leaf = name.rpartition(".")
        leaves[layer].add(leaf)
    return {layer: frozenset(own) for layer, own in leaves.items()}


def _given(file: TensorFile, layer: str, mark: FormatMark, held: frozenset[str]) -> MarkedLayer:
    stored = file.stored_shapes.get(f"{layer}.weight", ())
    scale = OLD_SCALE if OLD_SCALE in held and SCALE_LEAF not in held else SCALE_LEAF
    return MarkedLayer(layer, mark, LAYOUT_OF_FORMAT[mark.format].shape(stored), scale, held)


def _further_leaves(given: MarkedLayer) -> tuple[str, ...]:
    if not _is_matrix(given) or not is_valid(given.mark):
        return (given.scale, INPUT_SCALE_LEAF)
    return (*(one.leaf for one in LAYOUT_OF_FORMAT[given.mark.format].further(given)), INPUT_SCALE_LEAF)


def _is_matrix(given: MarkedLayer) -> bool:
    return len(given.shape) == 2 or given.mark.format in FP8_FORMATS


def _coding(file: TensorFile, given: MarkedLayer, faults: Faults) -> Coding | None:
    """The coding of a layer's weight; None if it has a fault, which is added to `faults`."""
    layout, weight = LAYOUT_OF_FORMAT[given.mark.format], given.key("weight")
    if "weight" not in given.held:
        faults[NO_WEIGHT].append(weight)
        return None
    if not _is_matrix(given) or file.dtype(weight) not in layout.dtypes:
        faults[OTHER_BITS if given.mark.format in FP8_FORMATS else OTHER_DTYPE].append(weight)
        return None
    if not is_valid(given.mark) or not has_whole_groups(given, coding := layout.coding(given)):
        faults[NO_GROUPS].append(f"{weight} {list(given.shape)}")
        return None
    fine = True
    for one in layout.further(given):
        key = given.key(one.leaf)
        if one.leaf not in given.held:
            if not one.optional:
                faults[NO_SCALE].append(weight)
                fine = False
        elif not (one.fits(file.stored_shapes[key]) and file.dtype(key) in one.dtypes):
            faults[STRANGE_SCALE].append(f"{key} {list(file.stored_shapes[key])} of {file.dtype(key)}")
            fine = False
    return coding if fine else None


def _named(marks: dict[str, FormatMark]) -> str:
    """The formats of a file, as its users name them."""
    return ", ".join(sorted({"fp8_scaled" if mark.format in FP8_FORMATS else mark.format for mark in marks.values()}))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
