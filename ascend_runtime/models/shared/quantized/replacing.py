"""Replaces a network's linear layers by quantized ones. The layers to quantize are listed in a file
(checkpoints/msmodelslim.py), or chosen by the family's rule if weights are quantized on the fly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ....checkpoints.faults import list_faults
from ....checkpoints.msmodelslim import DYNAMIC, INT4, MXFP8, STATIC, TIMESTEP, Layer
from ....errors import coded_error
from ....ops import in_preferred_layout
from ....ops.blocks.ggml import BLOCK_TYPES
from .base import QuantizedLinear
from .layers import DynamicLinear, Int4Linear, MxLinear
from .packed import PackedLinear
from .static import StaticLinear, TimestepLinear

QUANTIZATION_SCHEMES = {"w8a8_dynamic": Layer(DYNAMIC)}  # for weights that are quantized on the fly
KINDS = {
    DYNAMIC: DynamicLinear, STATIC: StaticLinear, TIMESTEP: TimestepLinear, MXFP8: MxLinear, INT4: Int4Linear,
    **dict.fromkeys(BLOCK_TYPES, PackedLinear),
}  # fmt: skip


def quantize(network: nn.Module, layers: Mapping[str, Layer], blocks: tuple[str, ...]) -> None:
    """Replaces the layers of these names by quantized ones on the meta device, which use network.ops.

    blocks: the prefixes of the names of layers in blocks.

    Raises ValueError for names that are not linear layers of a block.
    """
    strange = [name for name in layers if not (name.startswith(blocks) and _is_linear(network, name))]
    if strange:
        raise coded_error(
            "AV-1408",
            f"Only linear layers of blocks can be quantized; {list_faults({'are not': strange})}. Does the description "
            "belong to another model, or were embedders or the head quantized too?",
        )
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        made = KINDS[layer.algorithm](network.get_submodule(name), layer)
        made.ops = network.ops
        setattr(network.get_submodule(owner), leaf, made)


def _is_linear(network: nn.Module, name: str) -> bool:
    try:
        return isinstance(network.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def prefer_layouts(network: nn.Module) -> None:
    """Brings int8 weights into the layout that the device's operator prefers. Nothing may copy to them afterwards."""
    for module in network.modules():
        if isinstance(module, QuantizedLinear) and module.by_layout:
            module.weight = nn.Parameter(in_preferred_layout(module.weight.data), requires_grad=False)


def linears(network: nn.Module, chosen: Callable[[str], bool]) -> Iterable[str]:
    """The names of the network's linear layers for which `chosen` is true."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and chosen(name)]


def quantized_parameters(network: nn.Module) -> dict[str, torch.dtype]:
    """The fixed dtypes of the parameters of quantized layers, by name, whatever the dtype of the blocks."""
    return {
        f"{name}.{leaf}": parameter.dtype
        for name, module in network.named_modules() if isinstance(module, QuantizedLinear)
        for leaf, parameter in module.named_parameters() if leaf not in module.free
    }  # fmt: skip


def multiples_of(network: nn.Module) -> dict[str, int]:
    """In multiples of how many inputs tensor parallelism can cut the weights of quantized layers, by the names of these
    weights, where that is not 1."""
    return {
        f"{name}.weight": module.multiple
        for name, module in network.named_modules() if isinstance(module, QuantizedLinear) and module.multiple > 1
    }  # fmt: skip


def block_types(network: nn.Module) -> dict[str, str]:
    """The types of the blocks of a GGUF file in which layers keep their weights, by the layers' names."""
    return {name: module.kind.name for name, module in network.named_modules() if isinstance(module, PackedLinear)}


def check_cuts(network: nn.Module, cut_dim: Callable[[str], int | None], degree: int) -> None:
    """Raises ValueError if tensor parallelism of this degree would cut groups of a quantized weight's inputs apart, or
    if the inputs do not fit the format. cut_dim: the dim along which it cuts a parameter, by name."""
    kinds = {made: algorithm for algorithm, made in KINDS.items()}
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    for name, layer in layers.items():
        cuts = degree if cut_dim(f"{name}.weight") == 1 else 1
        width, multiple, kind = layer.in_features // cuts, layer.multiple, kinds[type(layer)]
        if layer.whole and layer.in_features % multiple:
            raise coded_error(
                "AV-1407",
                f"{name} has {layer.in_features} inputs; {kind} needs a multiple of {multiple}. Use the model's "
                "W8A8_DYNAMIC, bf16 or fp16 form.",
            )
        if cuts > 1 and width % multiple:
            raise coded_error(
                "AV-1415",
                f"tp_degree is {degree}, which gives each rank {width} of the {layer.in_features} inputs of {name}, "
                f"but its {kind} weights can only be cut in multiples of {multiple}. Set tp_degree to a smaller "
                "number, and use the other ranks for ulysses_degree or ring_degree.",
            )
