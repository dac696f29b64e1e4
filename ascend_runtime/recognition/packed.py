"""Which weights of a network can stay in the blocks of their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ..checkpoints.codings.packed import PackedWeights
from ..checkpoints.fused import targets_of
from ..checkpoints.opening import open_tensors
from ..models.shapes import Shapes
from ..ops.blocks.ggml import BLOCK_TYPES
from .component import Component


def weights_in_blocks(component: Component, linears: Callable[[], Iterable[str]]) -> dict[str, str]:
    """The weights that can stay in blocks, with the types of these, by the network's names. linears: makes the names of
    the network's linear layers; called only if the files have blocks."""
    rules, part = component.family.weights, component.part
    found: dict[str, str] = {}
    for shard in component.shards:
        with open_tensors(shard) as file:
            for key, kind in getattr(file, "kinds", {}).items():
                name, shape = component.own_name(key, shard), file.shapes[key]
                if name is None or kind not in BLOCK_TYPES or len(shape) != 2 or not file.in_rows(key):
                    continue
                values = BLOCK_TYPES[kind].values
                found |= {one.name: kind for one in targets_of(part.split, name, shape)
                          if one.has_whole_groups(values)}  # fmt: skip
    if not found:
        return {}
    weights = {f"{name}.weight" for name in linears() if name.startswith(part.blocks)}
    return {name: kind for name, kind in found.items() if name in weights and not rules.fp32(name)}


def with_packed(component: Component, weights: Mapping[str, str], shapes: Shapes, tp: int) -> Component:
    """The component with these weights in blocks, unless tensor parallelism of this degree would cut through their
    blocks. shapes: of the numbers of all weights, by name."""
    rules = component.family.weights
    layers = {
        name.removesuffix(".weight"): kind for name, kind in weights.items()
        if rules.keeps_whole(name, shapes[name], BLOCK_TYPES[kind].values, tp)
    }  # fmt: skip
    return replace(component, quantized=PackedWeights(component.shards[0], layers)) if layers else component
