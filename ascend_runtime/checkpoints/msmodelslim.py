"""Reads folders of msModelSlim (https://gitcode.com/Ascend/msmodelslim): which layers are quantized, and how.

`quant_model_description*.json` gives each tensor's algorithm, "FLOAT" for unquantized tensors; its other entries
concern the whole model. `quant_model_weight*.safetensors` lie next to it. A quantized layer has

    W8A8_DYNAMIC    weight [N, K] int8, weight_scale [N, 1], weight_offset [N, 1] (zeros), bias
    W8A8            weight, deq_scale [N], quant_bias [N] int32, input_scale [1], input_offset [1]
    W8A8_TIMESTEP   the tensors of both: for T steps, input_scale, input_offset [T, 1], deq_scale, quant_bias [T, N]
    W8A8_MXFP8      weight [N, K] float8_e4m3fn, weight_scale [N, K/32] uint8 (exponents plus 127), bias
    W4A4_DYNAMIC    as W8A8_DYNAMIC; the weight's values are from -8 to 7

and, if outliers were moved from activations to weights, `<layer>.div.mul_scale` [K]; the other tensors' names then
begin with `<layer>.linear.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..errors import coded_error
from ..ops.packing import EXPONENTS, FP8_BITS, PAIRS, Packing
from .bounded import MAX_NAME_LENGTH, check_count, read_json
from .faults import list_faults, shown
from .formats.tensor_file import TensorFile
from .opening import open_tensors
from .paths import DESCRIPTION_PATTERN

WEIGHTS_PATTERN = "quant_model_weight*.safetensors"
FLOAT = "FLOAT"
DYNAMIC, STATIC, TIMESTEP = "W8A8_DYNAMIC", "W8A8", "W8A8_TIMESTEP"
MXFP8, INT4 = "W8A8_MXFP8", "W4A4_DYNAMIC"
_BIAS, _NUMBERS, _INT8 = (torch.float32, torch.float16, torch.bfloat16), (torch.float32,), (torch.int8,)
_BY_TOKEN = {"weight": _INT8, "weight_scale": _NUMBERS, "bias": _BIAS, "mul_scale": _BIAS}
_BY_FILE = {"weight": _INT8, "deq_scale": (torch.float32, torch.int64), "quant_bias": (torch.int32,),
            "input_scale": _NUMBERS, "input_offset": _NUMBERS, "mul_scale": _BIAS}  # fmt: skip
# The tensors that each algorithm uses, with their allowed dtypes, and those it does not use. A static layer's bias is
# in quant_bias.
LAYER_TENSORS = {
    DYNAMIC: _BY_TOKEN,
    STATIC: _BY_FILE,
    TIMESTEP: _BY_TOKEN | _BY_FILE,
    MXFP8: {"weight": (torch.float8_e4m3fn,), "weight_scale": (torch.uint8,), "bias": _BIAS, "mul_scale": _BIAS},
    INT4: _BY_TOKEN,
}
UNUSED_TENSORS = {
    STATIC: ("weight_scale", "weight_offset", "bias"),
    **dict.fromkeys((DYNAMIC, TIMESTEP, MXFP8, INT4), ("weight_offset",)),
}
PACKINGS = {(MXFP8, "weight"): FP8_BITS, (MXFP8, "weight_scale"): EXPONENTS, (INT4, "weight"): PAIRS}
MAX_SCALES = 2**24  # numbers in all scales and offsets of a file, which are read; a 14B model has a fifth of it
# Scales that are read and must be above 0. Those of MXFP8 are exponents; a step's deq_scale is as large as an output.
SCALES = {
    STATIC: ("deq_scale", "input_scale"), TIMESTEP: ("weight_scale", "input_scale"), MXFP8: (),
    **dict.fromkeys((DYNAMIC, INT4), ("weight_scale",)),
}  # fmt: skip
# What an attention's entries add to its name: the algorithm of its products, the scales of its inputs.
ATTENTION_ENDING = re.compile(r"\.(quant_type|fa_[qkv]\.(scale|offset))$")
QUANTIZED_ATTENTION = ("FAQUANT", "FAKQUANT")  # the algorithms of an attention's scales
RANK_ENDING = re.compile(r"_\d+(?=\.json$)")  # in the description of one rank's weights
OTHER_FORM = "Use the model's W8A8_DYNAMIC, bf16 or fp16 form."
# What is not supported, by the first of these texts that the algorithm's name contains: what it is and which cards
# MindIE SD computes it on, and what to use instead.
UNSUPPORTED_FORMATS = {
    "MXFP4": (
        "MXFP4 is 4-bit floating point in groups of 32, which MindIE SD computes on cards of the 950 series.",
        "Use the model's W8A8_MXFP8, W8A8_DYNAMIC, bf16 or fp16 form.",
    ),
    "A16": ("MindIE SD computes weights of fewer bits than activations on cards of the A2 and A3 series.", OTHER_FORM),
}
UNSUPPORTED_ATTENTION = (
    "These attentions compute in fewer bits. MindIE SD supports that on cards of the 950 series, in older versions on "
    "cards of the A2 and A3 series.",
    "Use the model's W8A8_DYNAMIC, bf16 or fp16 form, or quantize it again without msModelSlim's processors fa3_quant "
    "and online_quarot. On cards of the 950 series, attention 'fp8' needs no such files.",
)


@dataclass(frozen=True)
class Layer:
    """A quantized layer. smoothed: whether its input is multiplied by mul_scale first. steps: the number of steps that
    have static scales of their own, if they have. rotation: the size of the groups of inputs that are rotated first
    (see ops/blocks/rotation.py); 0: none."""

    algorithm: str
    smoothed: bool = False
    steps: int = 1
    rotation: int = 0


@dataclass(frozen=True)
class Description:
    """The content of a description. layers: by their names in the files, without what moved outliers insert."""

    file: Path
    layers: dict[str, Layer]

    @cached_property
    def _smoothed(self) -> set[str]:
        """The names of the layers whose outliers were moved."""
        return {name for name, layer in self.layers.items() if layer.smoothed}

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

    def packing(self, key: str, name: str) -> Packing | None:
        """How the values of a tensor, which holds the parameter of this name, are kept as bytes; None: as numbers."""
        return PACKINGS.get(self._part(key))

    def with_steps(self, shards: Iterable[Path]) -> Description:
        """The description with the number of steps of each layer, from the headers of these files."""
        if TIMESTEP not in self.algorithms:
            return self
        layers = dict(self.layers)
        for shard in shards:
            with open_tensors(shard) as file:
                for key, shape in file.shapes.items():
                    if self._part(key) == (TIMESTEP, "input_scale") and shape:
                        name = plain_name(key, self._smoothed).rpartition(".")[0]
                        layers[name] = replace(layers[name], steps=shape[0])
        return replace(self, layers=layers)

    def _part(self, key: str) -> tuple[str, str] | None:
        """(the algorithm of a tensor's layer, the tensor's name in it); None if the layer is not quantized."""
        layer, _, leaf = plain_name(key, self._smoothed).rpartition(".")
        return (self.layers[layer].algorithm, leaf) if layer in self.layers else None


def description_in(folder: Path) -> Path | None:
    """The description in a folder, if any. Raises ValueError if there are several."""
    found = sorted(folder.glob(DESCRIPTION_PATTERN)) if folder.is_dir() else []
    if len(found) < 2:
        return found[0] if found else None
    names = ", ".join(file.name for file in found)
    if len({RANK_ENDING.sub("", file.name) for file in found}) == 1:
        raise coded_error(
            "AV-1305",
            f"{folder} has one description per rank: {names}. Weights that were cut for ranks when they were quantized "
            "are not supported. Quantize the model on one rank: its weights are cut when they are loaded, for any "
            "number of ranks.",
        )
    raise coded_error(
        "AV-1310",
        f"{folder} has several descriptions of quantized models: {names}. Put each into a separate folder, with its "
        "weights and the config.json.",
    )


def read_description(file: Path) -> Description:
    """Reads a description. Raises ValueError if it is invalid, or has unsupported algorithms: the error lists
    their layers, and the cards that support them."""
    content = read_json(file, "Quantize the model again.")
    check_count(file, content)
    if any(len(name) > MAX_NAME_LENGTH for name in content):
        raise coded_error(
            "AV-1312", f"{file} has a name of more than {MAX_NAME_LENGTH} characters. Quantize the model again."
        )
    smoothed = {name.removesuffix(".mul_scale").removesuffix(".div") for name in content if name.endswith(".mul_scale")}
    algorithms = {
        plain_name(name, smoothed): value.upper() for name, value in content.items() if isinstance(value, str)
    }
    _check(file, algorithms)
    quantized = {name.removesuffix(".weight"): algorithm for name, algorithm in algorithms.items()
                 if name.endswith(".weight") and algorithm != FLOAT}  # fmt: skip
    layers = {name: Layer(algorithm, name in smoothed) for name, algorithm in quantized.items()}
    if not layers:
        raise coded_error(
            "AV-1408", f"{file} names no quantized weight. Quantize the model again, or delete this file."
        )
    return Description(file, layers)


def _check(file: Path, algorithms: dict[str, str]) -> None:
    """Raises ValueError for unsupported algorithms of weights and attentions."""
    weights = {name.removesuffix(".weight"): value for name, value in algorithms.items() if name.endswith(".weight")}
    attentions = {ATTENTION_ENDING.sub("", name): value for name, value in algorithms.items()
                  if ATTENTION_ENDING.search(name) or value in QUANTIZED_ATTENTION}  # fmt: skip
    unsupported = {name: value for name, value in weights.items() if value != FLOAT and value not in LAYER_TENSORS}
    if not (unsupported or attentions):
        return
    found = sorted({*unsupported.values(), *attentions.values()})
    named = {**unsupported, **attentions}
    kinds = {f"as {shown(one)}": sorted(name for name, value in named.items() if value == one) for one in found}
    about = {next((text for mark, text in UNSUPPORTED_FORMATS.items() if mark in one), ("", OTHER_FORM))
             for one in unsupported.values()}  # fmt: skip
    about |= {UNSUPPORTED_ATTENTION} if attentions else set()
    texts = dict.fromkeys(text for pair in sorted(about, key=lambda pair: pair[1]) for text in pair if text)
    raise coded_error(
        "AV-1305", f"{file} quantizes layers in a way that is not supported: {list_faults(kinds)}. {' '.join(texts)}"
    )


def plain_name(key: str, smoothed: Collection[str]) -> str:
    """A tensor's name without what msModelSlim inserts for moved outliers. smoothed: the layers with such."""
    layer, _, leaf = key.rpartition(".")
    outer, _, inserted = layer.rpartition(".")
    return f"{outer}.{leaf}" if inserted in ("linear", "div") and outer in smoothed else key


def _check_parts(description: Path, file: TensorFile, parts: dict[str, tuple[str, str]]) -> None:
    dtypes, offsets, scales, large, left = [], [], [], [], MAX_SCALES
    for key, (algorithm, leaf) in parts.items():
        allowed, shape = LAYER_TENSORS[algorithm].get(leaf), file.shapes[key]
        is_scale = leaf in SCALES[algorithm]
        if leaf == "weight_offset" or is_scale:
            left -= math.prod(shape)
            if math.prod(shape[1:]) > 1 or left < 0:
                large.append(f"{key} {list(shape)}")
                continue
        if allowed and file.dtype(key) not in allowed:
            dtypes.append(f"{key} as {file.dtype(key)}")
        elif leaf == "weight_offset" and file.read(key).any():
            offsets.append(key)
        elif is_scale and not _is_scale(as_numbers(file.read(key))):
            scales.append(key)
    faults = list_faults({
        "with an unexpected dtype": dtypes,
        "with more than one number for each row, or too many": large,
        "with offsets other than 0, but weights must be symmetric": offsets,
        "that must be above 0": scales,
    })  # fmt: skip
    if faults:
        raise coded_error("AV-1408", f"{file.path} does not match {description.name}. Tensors {faults}. {OTHER_FORM}")


def _is_scale(numbers: torch.Tensor) -> bool:
    return bool(((numbers > 0) & (numbers < math.inf)).all())


def as_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Scales stored as int64 hold the bits of fp32 numbers, as an NPU's operator takes them for fp16 products."""
    return tensor.to(torch.int32).view(torch.float32) if tensor.dtype == torch.int64 else tensor
