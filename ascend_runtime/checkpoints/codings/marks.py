"""Reads ComfyUI's marks: which layers of a file are quantized, and how.

The older mark is a tensor `scaled_fp8`. The newer ones are `_quantization_metadata` in the header, or a tensor
`<layer>.comfy_quant`, both JSON with each layer's format and settings (Comfy-Org/ComfyUI, QUANTIZATION.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..bounded import parse_json
from ..faults import as_value_error

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile

OLD_MARK, NEW_MARK, LAYER_MARK = "scaled_fp8", "_quantization_metadata", "comfy_quant"
MAX_MARK_BYTES = 1024  # of a tensor that holds JSON; ComfyUI's have less than 100
FULL_PRECISION = "full_precision_matrix_mult"  # the setting of a layer whose products must not be in fewer bits


@dataclass(frozen=True)
class FormatMark:
    """format: as ComfyUI names it. settings: of the layer."""

    format: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, name: str, otherwise: Any) -> Any:
        """A setting, which some files have within `params`."""
        inner = self.settings.get("params")
        return self.settings.get(name, inner.get(name, otherwise) if isinstance(inner, Mapping) else otherwise)

    def number(self, name: str, otherwise: int) -> int:
        """A whole number of the settings; -1 for anything else."""
        given = self.setting(name, otherwise)
        return given if isinstance(given, int) and not isinstance(given, bool) else -1


def has_old_mark(names: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] == OLD_MARK for name in names)


def marks_of(file: TensorFile, own: Iterable[str]) -> dict[str, FormatMark]:
    """The newer marks of the layers whose weights are among the tensors `own`, by the layers' names in the file.

    A header may name layers without the prefix of all tensor names. Raises ValueError for marks that are not JSON.
    """
    own = list(own)
    marks = {}
    if NEW_MARK in file.header:
        with as_value_error(file.path, f"the header's {NEW_MARK}"):
            layers = _object(_object(parse_json(file.header[NEW_MARK])).get("layers", {}))
            marks = {name: _mark(layer) for name, layer in layers.items()}
        marks = {name: marks[short] for short, name in _full_names(file, own, marks).items()}
    for name in own:
        layer, _, leaf = name.rpartition(".")
        if leaf == LAYER_MARK:
            with as_value_error(file.path, name):
                marks[layer] = _mark(parse_json(_bytes_of(file, name)))
    return marks


def _mark(settings: Any) -> FormatMark:
    return FormatMark(str(_object(settings).get("format", "an unknown format")), settings)


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _bytes_of(file: TensorFile, name: str) -> bytes:
    shape = file.shapes[name]
    if math.prod(shape) > MAX_MARK_BYTES:
        raise ValueError(f"it has {list(shape)} bytes")
    if file.dtype(name) != torch.uint8:
        raise ValueError(f"it holds {file.dtype(name)} instead of bytes")
    return file.read(name).numpy().tobytes()


def _full_names(file: TensorFile, own: list[str], layers: Iterable[str]) -> dict[str, str]:
    """The full names of layers that may lack the prefix of all tensor names; layers of other networks are left out."""
    there = [layer for layer in layers if f"{layer}.weight" in file.shapes]
    kept = {layer: layer for layer in set(there).intersection(name.removesuffix(".weight") for name in own)}
    short = [layer for layer in layers if f"{layer}.weight" not in file.shapes]
    ends = tuple(f".{layer}.weight" for layer in short[:1])
    prefixes = {name.removesuffix(ends[0]) for name in own if name.endswith(ends)} if ends else set()
    prefix = f"{prefixes.pop()}." if len(prefixes) == 1 else ""
    return kept | {layer: f"{prefix}{layer}" for layer in short}
