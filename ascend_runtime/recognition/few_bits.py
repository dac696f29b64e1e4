"""Which layers of a network can compute products of the few bits that ComfyUI's marks give their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..checkpoints.codings.kept import KeptWeights, layer_of
from ..checkpoints.codings.marks import FormatMark
from ..checkpoints.codings.recognised import all_marks, codings_of
from ..checkpoints.fused import targets_of
from ..checkpoints.msmodelslim import MXFP8, Layer
from ..checkpoints.opening import open_tensors
from ..ops.mxfp8 import MX_GROUP
from .component import Component


def formats_of(component: Component) -> dict[str, int]:
    """The formats of a component's marked weights, with the number of each, the most frequent first."""
    counts: dict[str, int] = {}
    for shard in component.shards:
        with open_tensors(shard) as file:
            own = [key for key in file.shapes if component.rename(key, shard) is not None]
            for mark in all_marks(file, own).values():
                counts[mark.format] = counts.get(mark.format, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def with_few_bits(
    component: Component, linears: Iterable[str], computes: Callable[[str], bool], tp: int = 1
) -> Component:
    """The component, whose marked layers in the transformer's blocks are kept as they are stored. Those stay out whose
    groups of inputs tensor parallelism of this degree would cut apart.

    linears: the names of the network's linear layers. computes: whether the device has the products of an algorithm
    (see checkpoints.msmodelslim). Raises ValueError for invalid marks.
    """
    rules, part = component.family.weights, component.part
    possible = {name for name in linears if name.startswith(part.blocks) and not rules.fp32(f"{name}.weight")}
    layers: dict[str, Layer] = {}
    marks: dict[str, FormatMark] = {}
    for shard in component.shards:
        with open_tensors(shard) as file:
            own = [key for key in file.shapes if component.own_name(key, shard) is not None]
            codings = codings_of(file, own)
            for held, mark in all_marks(file, own).items():
                layer, key = layer_of(mark), f"{held}.weight"
                if layer is None or key not in codings.weights or not computes(layer.algorithm):
                    continue
                shape, size = file.shapes[key], MX_GROUP if layer.algorithm == MXFP8 else layer.rotation or 1
                targets = targets_of(part.split, component.own_name(key, shard), shape)
                names = [one.name.removesuffix(".weight") for one in targets]
                whole = (one.has_whole_groups(size) and rules.keeps_whole(one.name, one.shape_in(shape), size, tp)
                         for one in targets)  # fmt: skip
                if possible.issuperset(names) and all(whole):
                    layers |= dict.fromkeys(names, layer)
                    marks[held] = mark
    return replace(component, quantized=KeptWeights(component.shards[0], layers, marks)) if layers else component
