"""The bytes of the weights that a rank keeps: which part of each parameter, in which dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ...models.family import TRANSFORMER, WeightRules
from ...parallel.rows import own_rows
from ..facts import ITEMSIZES, Arrangement, Model, Network, StoredBlocks


@dataclass(frozen=True)
class Share:
    """The place of a rank among those that share weights: it holds slice number `slice` of `tp`, and of that slice
    FSDP's shard number `shard` of `shards`. packed: whether weights stay in the blocks of their files."""

    tp: int = 1
    slice: int = 0
    shards: int = 1
    shard: int = 0
    packed: bool = False

    @classmethod
    def of(cls, arrangement: Arrangement, rank: int) -> Share:
        """As parallel.fsdp.sharding_of: the ranks form the grid fsdp x tp."""
        plan = arrangement.plan
        others = math.prod(plan.degrees) // plan.tp
        slice, shard = rank % plan.tp, rank // plan.tp
        shards = (others, shard) if arrangement.fsdp else (1, 0)
        return cls(plan.tp, slice, *shards, arrangement.packed)


class OwnPart(NamedTuple):
    """What a rank keeps of a parameter. shape: of its part. whole: the bytes of its slice before FSDP shards it.
    mapped: whether a CPU maps it from its file, as it is stored the way it is kept."""

    shape: tuple[int, ...]
    nbytes: int
    whole: int
    mapped: bool


NO_RULES = WeightRules()


def rules_of(model: Model, network: Network) -> WeightRules:
    """Only transformers have rules; other networks are kept in one dtype, and not cut."""
    return model.family.weights if network.part == TRANSFORMER else NO_RULES


@lru_cache(maxsize=512)
def kept(network: Network, rules: WeightRules, dtype: str, share: Share = Share()) -> Mapping[str, OwnPart]:
    """What a rank keeps of each parameter, by name. dtype: of what the rules do not keep otherwise."""
    return {name: _kept(network, name, shape, rules, dtype, share) for name, shape in network.shapes.items()}


def _kept(
    network: Network, name: str, shape: tuple[int, ...], rules: WeightRules, dtype: str, share: Share
) -> OwnPart:
    fixed = network.quantized.get(name)
    if not rules.keeps_whole(name, shape, network.multiples.get(name, 1), share.tp):
        fixed = None  # dequantized, as slices would cut groups of its inputs apart
    dtype = fixed or ("float32" if rules.fp32(name) else dtype)
    itemsize = ITEMSIZES[dtype]
    cut = own_slice(name, shape, rules, share.tp)
    blocks = packed_in(network, rules, share.tp).get(name) if share.packed else None
    if blocks:
        cut, itemsize = (*cut[:-1], cut[-1] // blocks.values * blocks.nbytes), 1
    part = cut
    if share.shards > 1 and not rules.replicated(name):
        part = (len(own_rows(cut[0], share.shards, share.shard)), *cut[1:])
    mapped = not blocks and part == shape and network.stored_types.get(name) == dtype
    return OwnPart(part, math.prod(part) * itemsize, math.prod(cut) * itemsize, mapped)


def own_slice(name: str, shape: tuple[int, ...], rules: WeightRules, tp: int) -> tuple[int, ...]:
    """The shape of a parameter's slice by tensor parallelism of degree `tp`. A dim of one element belongs to all."""
    dim = rules.cut_dim(name) if tp > 1 else None
    if dim is None or shape[dim] == 1:
        return shape
    cut = [*shape]
    cut[dim] //= tp
    return tuple(cut)


@lru_cache(maxsize=64)
def packed_in(network: Network, rules: WeightRules, tp: int) -> Mapping[str, StoredBlocks]:
    """The weights of a network that stay in blocks, by name: those that tensor parallelism cuts between blocks."""
    return {name: blocks for name, blocks in network.packed.items()
            if rules.keeps_whole(name, network.shapes[name], blocks.values, tp)}  # fmt: skip


def on_device(parts: Mapping[str, OwnPart], kind: str) -> int:
    """Bytes that a rank takes of a device of this kind. A CPU maps what is stored as it is kept: the kernel can take
    these pages back at any time."""
    return sum(one.nbytes for one in parts.values() if not (kind == "cpu" and one.mapped))


def quantized_layers_of(network: Network) -> frozenset[str]:
    """The linear layers of a network whose weights are kept in 8 bits or less."""
    return frozenset(name.removesuffix(".weight") for name in network.quantized if name.endswith(".weight"))
