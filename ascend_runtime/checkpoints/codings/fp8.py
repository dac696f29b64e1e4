"""Reads fp8 weights with scales: recognises their marks, and finds each weight's scale.

ComfyUI's files have one of two marks. The older: a tensor `scaled_fp8`, and `<layer>.scale_weight` (optionally
`<layer>.scale_input`). The newer: `_quantization_metadata` in the header, or a tensor `<layer>.comfy_quant`, both JSON
with a layer's format, and `<layer>.weight_scale` (optionally `<layer>.input_scale`). A weight is its 8-bit value times
its scale, which is one number, or one for each row: [N, 1] for a weight [N, K]. Input scales are for matrix products in
fp8, which are not used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...errors import coded_error
from ..bounded import parse_json
from ..faults import as_value_error, list_faults, shown
from ..formats.parts import Slices, full_slices
from ..formats.tensor_files import TensorFile
from .coding import Codings

OLD_MARK, NEW_MARK, LAYER_MARK = "scaled_fp8", "_quantization_metadata", "comfy_quant"
OLD_SCALES = {"scale_weight": True, "scale_input": False}  # True for a weight's scale
NEW_SCALES = {"weight_scale": True, "input_scale": False}
MAX_MARK_BYTES = 4096  # of a tensor that holds JSON; ComfyUI's have less than 100
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Scaled:
    """The coding (see coding.py) of a weight in 8 bits: each number times its scale. scale: the scale's name."""

    scale: str
    grain, bits = 1, 8

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.scale,)

    def numbers(self, file: TensorFile, key: str, part: Slices) -> torch.Tensor:
        return file.read(key, part).float() * _scale_of(file, self.scale, part)


def codings_of(file: TensorFile, own: list[str]) -> Codings:
    """How the weights among the tensors `own` of a file are stored.

    Both fields are empty if the file has no mark. Raises ValueError for an unsupported format or an invalid mark; lists
    weights without a scale, and scales without a weight.
    """
    leaves = {name: name.rpartition(".")[2] for name in own}
    marks = {name for name, leaf in leaves.items() if leaf in (OLD_MARK, LAYER_MARK)}
    old = any(leaves[name] == OLD_MARK for name in marks)
    formats = _formats(file, own, [name for name in marks if leaves[name] == LAYER_MARK])
    for layer, kept in formats.items():
        if kept not in FP8_FORMATS:
            held = f"{shown(layer)} as {shown(kept)}"
            raise coded_error("AV-1305", f"{file.path} holds {held}. Use the model's fp8_scaled, fp16 or bf16 form.")
    kinds = (OLD_SCALES if old else {}) | (NEW_SCALES if formats else {})
    scales = {f"{name.removesuffix(leaf)}weight": name for name, leaf in leaves.items() if kinds.get(leaf)}
    marked = {f"{layer}.weight" for layer in formats}
    if old:
        marked |= {name for name, leaf in leaves.items() if leaf == "weight" and is_8_bits(file.dtype(name))}
    _check(file, scales, marked)
    others = marks | {name for name, leaf in leaves.items() if leaf in kinds}
    return Codings({weight: Scaled(scale) for weight, scale in scales.items()}, others)


def refuse_other_scales(file: TensorFile, own: list[str]) -> None:
    """Raises ValueError for unmarked 8-bit weights with one scale for each row: LightX2V's own format."""
    leaf = "weight_scale"
    scales = [name for name in own if name.endswith(f".{leaf}") and math.prod(file.shapes[name]) > 1]
    weights = [weight for weight in (f"{name.removesuffix(leaf)}weight" for name in scales) if weight in file.shapes]
    rows = [weight for weight in weights if file.dtype(weight).itemsize == 1]
    if rows:
        what = str(file.dtype(rows[0])).removeprefix("torch.")
        raise coded_error(
            "AV-1305",
            f"{file.path} holds {len(rows)} weights as {what} with one scale for each row, such as {rows[0]}: "
            "LightX2V's format, which is not supported. Use the model's fp8_scaled, fp16 or bf16 form.",
        )


def _formats(file: TensorFile, own: list[str], marks: list[str]) -> dict[str, str]:
    """The format of each marked layer. A header may name layers without the prefix of all tensor names."""
    with as_value_error(file.path, f"the header's {NEW_MARK}"):
        layers = dict(parse_json(file.header.get(NEW_MARK, "{}")).get("layers", {}))
        formats = {name: layer.get("format", "an unknown format") for name, layer in layers.items()}
    formats = {name: formats[short] for short, name in _full_names(file, own, formats).items()}
    for name in marks:
        with as_value_error(file.path, name):
            if math.prod(file.shapes[name]) > MAX_MARK_BYTES:
                raise ValueError(f"it has {list(file.shapes[name])} bytes")
            mark = parse_json(bytes(file.read(name).tolist()))
            formats[name.rpartition(".")[0]] = mark.get("format", "an unknown format")
    return formats


def _full_names(file: TensorFile, own: list[str], layers: Iterable[str]) -> dict[str, str]:
    """The full names of layers that may lack the prefix of all tensor names; layers of other networks are left out."""
    there = [layer for layer in layers if f"{layer}.weight" in file.shapes]
    kept = {layer: layer for layer in set(there).intersection(name.removesuffix(".weight") for name in own)}
    short = [layer for layer in layers if f"{layer}.weight" not in file.shapes]
    ends = tuple(f".{layer}.weight" for layer in short[:1])
    prefixes = {name.removesuffix(ends[0]) for name in own if name.endswith(ends)} if ends else set()
    prefix = f"{prefixes.pop()}." if len(prefixes) == 1 else ""
    return kept | {layer: f"{prefix}{layer}" for layer in short}


def _check(file: TensorFile, scales: dict[str, str], marked: set[str]) -> None:
    """Raises ValueError, which lists weights without a valid scale and scales without a valid weight."""
    faults = list_faults({
        "without a scale": sorted(marked - scales.keys()),
        "that are not a scale": [
            f"{scale} {list(file.shapes[scale])} of {file.dtype(scale)}" for weight, scale in scales.items()
            if not (_fits(file.shapes[scale], file.shapes.get(weight, ())) and file.dtype(scale).is_floating_point)
        ],
        "with a scale, but not in 8 bits": [
            weight for weight in scales if weight not in file.shapes or not is_8_bits(file.dtype(weight))
        ],
    })  # fmt: skip
    if faults:
        raise coded_error(
            "AV-1408",
            f"{file.path} is marked as fp8_scaled. Tensors {faults}. Download it again, or use its fp16 or bf16 form.",
        )


def is_8_bits(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale of this shape is one number, or one for each row of a weight of that shape."""
    return math.prod(scale) == 1 or len(weight) > 1 and scale == (weight[0], *(1 for _ in weight[1:]))


def _scale_of(file: TensorFile, name: str, part: Slices) -> float | torch.Tensor:
    """The scale of a part of an 8-bit weight: a number, or one for each row of the part, [rows, 1].

    Raises ValueError for a scale that is not finite and above 0.
    """
    shape = file.shapes[name]
    of_rows = math.prod(shape) != 1
    scales = file.read(name, (part[0], *full_slices(shape)[1:]) if of_rows else None).float()
    if wrong := [scale for scale in scales.flatten().tolist() if not 0 < scale < math.inf]:
        raise coded_error(
            "AV-1408", f"{file.path} has the scale {wrong[0]} in {name}; it must be above 0. Download it again."
        )
    return scales if of_rows else scales.item()
