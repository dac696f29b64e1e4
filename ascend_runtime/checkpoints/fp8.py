"""Weights kept in 8 bits, each tensor with one scale: what marks them, and which scale belongs to which.

ComfyUI's files have one of two marks. The older: a tensor `scaled_fp8`, and `<layer>.scale_weight` (and perhaps
`<layer>.scale_input`). The newer: `_quantization_metadata` in the header, or a tensor `<layer>.comfy_quant`, each JSON
that says a layer's format, and `<layer>.weight_scale` (and perhaps `<layer>.input_scale`). A weight is its 8-bit value
times its scale; scales of inputs are for products in 8 bits, of which there are none here.
"""

from __future__ import annotations

import json

import torch

from .tensor_files import TensorFile

OLD_MARK, NEW_MARK, LAYER_MARK = "scaled_fp8", "_quantization_metadata", "comfy_quant"
OLD_SCALES = {"scale_weight": True, "scale_input": False}  # whether it is a weight's
NEW_SCALES = {"weight_scale": True, "input_scale": False}
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def scales_of(file: TensorFile) -> tuple[dict[str, str], set[str]]:
    """(the names of the weights' scales by those of the weights; all names that are no weights but marks or scales).

    Both are empty where the file has no mark. Raises ValueError for a format that is not one scale a tensor.
    """
    leaves = {name: name.rpartition(".")[2] for name in file.shapes}
    marks = {name for name, leaf in leaves.items() if leaf in (OLD_MARK, LAYER_MARK)}
    kinds = OLD_SCALES if any(leaves[name] == OLD_MARK for name in marks) else {}
    formats = _formats(file, [name for name in marks if leaves[name] == LAYER_MARK])
    if formats:
        kinds = kinds | NEW_SCALES
    for layer, kept in formats.items():
        if kept not in FORMATS:
            raise ValueError(f"{file.path} holds {layer} as {kept}. Take its fp8_scaled, fp16 or bf16 form.")
    scales = {}
    for name, leaf in leaves.items():
        if kinds.get(leaf):
            weight = f"{name.removesuffix(leaf)}weight"
            if torch.Size(file.shapes[name]).numel() != 1 or weight not in file.shapes:
                raise ValueError(f"{file.path} holds {name} as {list(file.shapes[name])}: it is no scale of {weight}.")
            scales[weight] = name
    return scales, marks | {name for name, leaf in leaves.items() if leaf in kinds}


def _formats(file: TensorFile, marks: list[str]) -> dict[str, str]:
    """The format of each marked layer."""
    layers = json.loads(file.header.get(NEW_MARK, "{}")).get("layers", {})
    layers = layers | {name.rpartition(".")[0]: json.loads(bytes(file.read(name).tolist())) for name in marks}
    return {name: layer.get("format", "nothing known") for name, layer in layers.items()}


def dequantized(tensor: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A part of a weight, in fp32 where it was kept in 8 bits; scale: of one element, or None."""
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()
    return tensor if scale is None else tensor.float() * scale.float().reshape(())
