"""Reads folders of msModelSlim (https://gitcode.com/Ascend/msmodelslim): which layers are quantized, and how.

`quant_model_description*.json` gives each tensor's algorithm, "FLOAT" for unquantized tensors; its other entries
concern the whole model. `quant_model_weight*.safetensors` lie next to it. A quantized layer has

    W8A8_DYNAMIC    weight [N, K] int8, weight_scale [N, 1], weight_offset [N, 1] (zeros), bias
    W8A8            weight, deq_scale [N], quant_bias [N] int32, input_scale [1], input_offset [1]
    W8A8_TIMESTEP   the tensors of both; one input scale for each step

and, if outliers were moved from activations to weights, `<layer>.div.mul_scale` [K]; the other tensors' names then
begin with `<layer>.linear.`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .bounded import MAX_NAME_LENGTH, check_count, read_json
from .faults import list_faults, shown
from .formats.tensor_files import TensorFile
from .renaming import MODELSLIM, renamed

DESCRIPTION_PATTERN, WEIGHTS_PATTERN = "quant_model_description*.json", "quant_model_weight*.safetensors"
FLOAT = "FLOAT"
DYNAMIC, STATIC, TIMESTEP = "W8A8_DYNAMIC", "W8A8", "W8A8_TIMESTEP"
_BIAS, _NUMBERS = (torch.float32, torch.float16, torch.bfloat16), (torch.float32,)
# The tensors that each algorithm uses, with their allowed dtypes, and those it does not use. A static layer's bias is
# in quant_bias. A W8A8_TIMESTEP layer is computed as W8A8_DYNAMIC, whose tensors it has.
LAYER_TENSORS = {
    DYNAMIC: {"weight": (torch.int8,), "weight_scale": _NUMBERS, "bias": _BIAS, "mul_scale": _BIAS},
    STATIC: {"weight": (torch.int8,), "deq_scale": (torch.float32, torch.int64), "quant_bias": (torch.int32,),
             "input_scale": _NUMBERS, "input_offset": _NUMBERS, "mul_scale": _BIAS},
    TIMESTEP: {"weight": (torch.int8,), "weight_scale": _NUMBERS, "bias": _BIAS, "mul_scale": _BIAS},
}  # fmt: skip
UNUSED_TENSORS = {
    DYNAMIC: ("weight_offset",),
    STATIC: ("weight_scale", "weight_offset", "bias"),
    TIMESTEP: ("weight_offset", "deq_scale", "quant_bias", "input_scale", "input_offset"),
}
MAX_SCALES = 2**24  # numbers in all scales and offsets of a file, which are read; a 14B model has a fifth of it
SCALES = ("weight_scale", "deq_scale", "input_scale")  # must be above 0
# The cards that support an algorithm, by the first of these texts that its name contains.
SUPPORTING_CARDS = {
    "MXFP": "cards of the 950 series",
    "FP8": "cards of the 950 series",
    "FAQUANT": "cards of the A2, A3 and 950 series",
    "W4A4": "cards of the A2 and A3 series",
    "A16": "cards of the A2 and A3 series",
}
ATTENTION_SUFFIX = ".quant_type"  # after an attention's name: the algorithm of its matrix products
QUANTIZED_ATTENTION = "FAQUANT"  # the algorithm of an attention's scales
OTHER_FORM = "Use the model's W8A8_DYNAMIC, bf16 or fp16 form."


@dataclass(frozen=True)
class Layer:
    """A quantized layer. smoothed: whether its input is multiplied by mul_scale first."""

    algorithm: str
    smoothed: bool = False


@dataclass(frozen=True)
class Description:
    """The content of a description. layers: by their names in the files."""

    file: Path
    layers: dict[str, Layer]

    @property
    def algorithms(self) -> list[str]:
        """The layers' algorithms, each once."""
        return sorted({layer.algorithm for layer in self.layers.values()})

    def renamed(self, parameters: Callable[[str], Iterable[str]]) -> dict[str, Layer]:
        """The layers by the network's names. parameters: the network's names of the parameters in a tensor."""
        return {
            own.removesuffix(".weight"): layer
            for name, layer in self.layers.items() for own in parameters(f"{name}.weight")
        }  # fmt: skip

    def parts_in(self, file: TensorFile) -> dict[str, bool]:
        """The tensors of quantized layers in a file, and whether each is used.

        Raises ValueError, which lists invalid tensors: with a wrong dtype, with an offset other than 0, or with a scale
        that is not above 0. Reads scales and offsets.
        """
        parts = {key: self._part(key) for key in file.shapes}
        parts = {key: part for key, part in parts.items() if part}
        _check_parts(self.file, file, parts)
        return {key: leaf not in UNUSED_TENSORS[algorithm] for key, (algorithm, leaf) in parts.items()}

    def _part(self, key: str) -> tuple[str, str] | None:
        """(the algorithm of a tensor's layer, the tensor's name in it); None if the layer is not quantized."""
        layer, _, leaf = plain_name(key).rpartition(".")
        return (self.layers[layer].algorithm, leaf) if layer in self.layers else None


def description_in(folder: Path) -> Path | None:
    """The description in a folder, if any. Raises ValueError if there are several."""
    found = sorted(folder.glob(DESCRIPTION_PATTERN)) if folder.is_dir() else []
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several descriptions of quantized models: {', '.join(file.name for file in found)}. Put "
            "each into a separate folder, with its weights and the config.json."
        )
    return found[0] if found else None


def read_description(file: Path) -> Description:
    """Reads a description. Raises ValueError if it is invalid, or has unsupported algorithms: the error lists
    their layers, and the cards that support them."""
    content = read_json(file, "Quantize the model again.")
    check_count(file, content)
    if any(len(name) > MAX_NAME_LENGTH for name in content):
        raise ValueError(f"{file} has a name of more than {MAX_NAME_LENGTH} characters. Quantize the model again.")
    algorithms = {plain_name(name): value.upper() for name, value in content.items() if isinstance(value, str)}
    _check(file, algorithms)
    smoothed = {name.removesuffix(".mul_scale") for name in algorithms if name.endswith(".mul_scale")}
    quantized = {name.removesuffix(".weight"): algorithm for name, algorithm in algorithms.items()
                 if name.endswith(".weight") and algorithm != FLOAT}  # fmt: skip
    layers = {name: Layer(algorithm, name in smoothed) for name, algorithm in quantized.items()}
    if not layers:
        raise ValueError(f"{file} names no quantized weight. Quantize the model again, or delete this file.")
    return Description(file, layers)


def _check(file: Path, algorithms: dict[str, str]) -> None:
    """Raises ValueError for unsupported algorithms of weights and attentions."""
    weights = {name.removesuffix(".weight"): value for name, value in algorithms.items() if name.endswith(".weight")}
    attentions = {name.removesuffix(ATTENTION_SUFFIX): value for name, value in algorithms.items()
                  if name.endswith(ATTENTION_SUFFIX) or value == QUANTIZED_ATTENTION}  # fmt: skip
    unsupported = {name: value for name, value in weights.items() if value != FLOAT and value not in LAYER_TENSORS}
    unsupported |= attentions
    if not unsupported:
        return
    found = sorted(set(unsupported.values()))
    cards = {next((cards for mark, cards in SUPPORTING_CARDS.items() if mark in one), None) for one in found} - {None}
    kinds = {f"as {shown(one)}": sorted(name for name, value in unsupported.items() if value == one) for one in found}
    raise ValueError(
        f"{file} quantizes layers in a way that is not supported: {list_faults(kinds)}. "
        + (f"MindIE SD supports it on {' and '.join(sorted(cards))}. " if cards else "")
        + OTHER_FORM
    )


def plain_name(key: str) -> str:
    """A tensor's name without what msModelSlim inserts for moved outliers."""
    return renamed(key, MODELSLIM)


def _check_parts(description: Path, file: TensorFile, parts: dict[str, tuple[str, str]]) -> None:
    dtypes, offsets, scales, large, left = [], [], [], [], MAX_SCALES
    for key, (algorithm, leaf) in parts.items():
        allowed, shape = LAYER_TENSORS[algorithm].get(leaf), file.shapes[key]
        if leaf == "weight_offset" or allowed and leaf in SCALES:
            left -= math.prod(shape)
            if math.prod(shape[1:]) > 1 or left < 0:
                large.append(f"{key} {list(shape)}")
                continue
        if allowed and file.dtype(key) not in allowed:
            dtypes.append(f"{key} as {file.dtype(key)}")
        elif leaf == "weight_offset" and file.read(key).any():
            offsets.append(key)
        elif allowed and leaf in SCALES and not _is_scale(as_numbers(file.read(key))):
            scales.append(key)
    faults = list_faults({
        "with an unexpected dtype": dtypes,
        "with more than one number for each row, or too many": large,
        "with offsets other than 0, but weights must be symmetric": offsets,
        "that must be above 0": scales,
    })  # fmt: skip
    if faults:
        raise ValueError(f"{file.path} does not match {description.name}. Tensors {faults}. {OTHER_FORM}")


def _is_scale(numbers: torch.Tensor) -> bool:
    return bool(((numbers > 0) & (numbers < math.inf)).all())


def as_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Scales stored as int64 hold the bits of fp32 numbers, as an NPU's operator takes them for fp16 products."""
    return tensor.to(torch.int32).view(torch.float32) if tensor.dtype == torch.int64 else tensor
