"""Folders that msModelSlim wrote (https://gitcode.com/Ascend/msmodelslim): which layers are quantized, and how.

`quant_model_description*.json` says of each tensor an algorithm, "FLOAT" of those that were left alone; what it says
beside that is of the whole model. `quant_model_weight*.safetensors` lie beside it. Of a quantized layer there are

    W8A8_DYNAMIC    weight [N, K] int8, weight_scale [N, 1], weight_offset [N, 1] (zeros), bias
    W8A8            weight, deq_scale [N], quant_bias [N] int32, input_scale [1], input_offset [1]
    W8A8_TIMESTEP   those of both; with one scale of the input a step

and, where outliers were moved from activations to weights, `<layer>.div.mul_scale` [K], with `<layer>.linear.` before
the others' names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .bounded import LONGEST_NAME, check_count, read_json
from .faults import listed, shown
from .formats.tensor_files import TensorFile
from .renaming import MODELSLIM, renamed

DESCRIPTION, WEIGHTS = "quant_model_description*.json", "quant_model_weight*.safetensors"
FLOAT = "FLOAT"
DYNAMIC, STATIC, TIMESTEP = "W8A8_DYNAMIC", "W8A8", "W8A8_TIMESTEP"
_BIAS, _NUMBERS = (torch.float32, torch.float16, torch.bfloat16), (torch.float32,)
# What each algorithm computes with, in which dtypes it may lie there; and what lies there and is not needed. The
# bias of a static layer is in quant_bias. One of timesteps is computed as a dynamic one, which it is as well.
PARTS = {
    DYNAMIC: {"weight": (torch.int8,), "weight_scale": _NUMBERS, "bias": _BIAS, "mul_scale": _BIAS},
    STATIC: {"weight": (torch.int8,), "deq_scale": (torch.float32, torch.int64), "quant_bias": (torch.int32,),
             "input_scale": _NUMBERS, "input_offset": _NUMBERS, "mul_scale": _BIAS},
    TIMESTEP: {"weight": (torch.int8,), "weight_scale": _NUMBERS, "bias": _BIAS, "mul_scale": _BIAS},
}  # fmt: skip
BESIDE = {
    DYNAMIC: ("weight_offset",),
    STATIC: ("weight_scale", "weight_offset", "bias"),
    TIMESTEP: ("weight_offset", "deq_scale", "quant_bias", "input_scale", "input_offset"),
}
MOST_NUMBERS = 2**24  # of all scales and offsets of a file, which are read; a 14B model's has a fifth of it
SCALES = ("weight_scale", "deq_scale", "input_scale")  # numbers above 0
# What is recognised by a part of its name, the first that fits, and which cards compute it.
ELSEWHERE = {
    "MXFP": "cards of the 950 series",
    "FP8": "cards of the 950 series",
    "FAQUANT": "cards of the A2, A3 and 950 series",
    "W4A4": "cards of the A2 and A3 series",
    "A16": "cards of the A2 and A3 series",
}
ATTENTION = ".quant_type"  # after an attention's name: the algorithm of its products
QUANTIZED_ATTENTION = "FAQUANT"  # what is said of an attention's scales
OTHER_FORM = "Take the model's W8A8_DYNAMIC, bf16 or fp16 form."


@dataclass(frozen=True)
class Layer:
    """A quantized layer. smoothed: whether its input is to be multiplied first."""

    algorithm: str
    smoothed: bool = False


@dataclass(frozen=True)
class Description:
    """layers: by their names in the files."""

    file: Path
    layers: dict[str, Layer]

    @property
    def algorithms(self) -> list[str]:
        """Those of the layers, each once."""
        return sorted({layer.algorithm for layer in self.layers.values()})

    def renamed(self, parameters: Callable[[str], Iterable[str]]) -> dict[str, Layer]:
        """The layers by the names that a network has for them. parameters: what it calls those in a tensor, by its
        name."""
        return {
            own.removesuffix(".weight"): layer
            for name, layer in self.layers.items() for own in parameters(f"{name}.weight")
        }  # fmt: skip

    def parts_in(self, file: TensorFile) -> dict[str, bool]:
        """The tensors of quantized layers in a file, and whether they are needed.

        Raises ValueError that lists those that are not what they are to be: of another dtype, an offset that is not 0,
        a scale that is no number above 0. Scales and offsets are read.
        """
        parts = {key: self._part(key) for key in file.shapes}
        parts = {key: part for key, part in parts.items() if part}
        _check_parts(self.file, file, parts)
        return {key: leaf not in BESIDE[algorithm] for key, (algorithm, leaf) in parts.items()}

    def _part(self, key: str) -> tuple[str, str] | None:
        """(the algorithm of the layer of which a tensor is a part, if it is quantized; the part's name)"""
        layer, _, leaf = plain_name(key).rpartition(".")
        return (self.layers[layer].algorithm, leaf) if layer in self.layers else None


def description_in(folder: Path) -> Path | None:
    """The description in a folder. Raises ValueError where there are several."""
    found = sorted(folder.glob(DESCRIPTION)) if folder.is_dir() else []
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several descriptions of quantized models: {', '.join(file.name for file in found)}. Give "
            "each a folder of its own, with its weights and the config.json."
        )
    return found[0] if found else None


def read_description(file: Path) -> Description:
    """Raises ValueError for one that cannot be read, and for what is not computed here, by the names of layers and of
    the cards that compute it."""
    said_of = read_json(file, "Quantize the model again.")
    check_count(file, said_of)
    if any(len(name) > LONGEST_NAME for name in said_of):
        raise ValueError(f"{file} names a tensor in more than {LONGEST_NAME} characters. Quantize the model again.")
    algorithms = {plain_name(name): said.upper() for name, said in said_of.items() if isinstance(said, str)}
    _check(file, algorithms)
    smoothed = {name.removesuffix(".mul_scale") for name in algorithms if name.endswith(".mul_scale")}
    quantized = {name.removesuffix(".weight"): said for name, said in algorithms.items()
                 if name.endswith(".weight") and said != FLOAT}  # fmt: skip
    layers = {name: Layer(said, name in smoothed) for name, said in quantized.items()}
    if not layers:
        raise ValueError(f"{file} names no quantized weight. Quantize the model again, or delete this file.")
    return Description(file, layers)


def _check(file: Path, algorithms: dict[str, str]) -> None:
    """Raises ValueError for algorithms of weights and of attentions that are not computed here."""
    weights = {name.removesuffix(".weight"): said for name, said in algorithms.items() if name.endswith(".weight")}
    attentions = {name.removesuffix(ATTENTION): said for name, said in algorithms.items()
                  if name.endswith(ATTENTION) or said == QUANTIZED_ATTENTION}  # fmt: skip
    unknown = {name: said for name, said in weights.items() if said != FLOAT and said not in PARTS} | attentions
    if not unknown:
        return
    said = sorted(set(unknown.values()))
    cards = {next((cards for mark, cards in ELSEWHERE.items() if mark in one), None) for one in said} - {None}
    kinds = {f"as {shown(one)}": sorted(name for name, its in unknown.items() if its == one) for one in said}
    raise ValueError(
        f"{file} quantizes layers in a way that is not computed here: {listed(kinds)}. "
        + (f"That is for {' and '.join(sorted(cards))}, in MindIE SD. " if cards else "")
        + OTHER_FORM
    )


def plain_name(key: str) -> str:
    """A tensor's name, as that of a layer whose outliers were not moved."""
    return renamed(key, MODELSLIM)


def _check_parts(description: Path, file: TensorFile, parts: dict[str, tuple[str, str]]) -> None:
    dtypes, offsets, scales, large, left = [], [], [], [], MOST_NUMBERS
    for key, (algorithm, leaf) in parts.items():
        allowed, shape = PARTS[algorithm].get(leaf), file.shapes[key]
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
    told = listed({
        "of another dtype than they are to be": dtypes,
        "that have more than one number a row, or too many": large,
        "that shift weights, which are to be symmetric": offsets,
        "that are to be above 0 and are not": scales,
    })  # fmt: skip
    if told:
        raise ValueError(f"{file.path} is not as {description.name} says. Tensors {told}. {OTHER_FORM}")


def _is_scale(numbers: torch.Tensor) -> bool:
    return bool(((numbers > 0) & (numbers < math.inf)).all())


def as_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Scales that lie as int64 are the bits of an fp32: what an NPU's operator takes for products in fp16."""
    return tensor.to(torch.int32).view(torch.float32) if tensor.dtype == torch.int64 else tensor
