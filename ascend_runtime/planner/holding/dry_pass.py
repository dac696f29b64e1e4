"""Runs a transformer's pass on the meta device.

The blocks, the ways to share a sequence and the conditioning are the real ones; a few blocks stand for all. Only
kernels are replaced (see kernels.py), and exchanges send nothing (see parallel.dry).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...models.family import TRANSFORMER
from ...models.shared.block_stack import BlockStack, Pass
from ...models.shared.conditioning import Branch, Given
from ...models.shared.latents import Latents
from ...checkpoints.msmodelslim import Layer
from ...models.shared.quantized.replacing import QUANTIZATION_SCHEMES, quantize, quantized_parameters
from ...ops.memory import Tracking, allocated
from ...parallel.dry import EXCHANGE, Seat, dry_sequence, dry_tensor_parallel, seats
from ...parallel.fsdp import ShardedWeights, Sharding
from .dry_job import DryNetwork, DryRank, DryVideo, PassBytes
from .kernels import operators_on

TIMESTEP = 500.0  # any


@dataclass(frozen=True, eq=False)
class _Prompt:
    """See models.shared.conditioning.Prompt."""

    text: Tensor
    pooled: Tensor | None
    concat_latent = concat_mask = clip_vision = None
    tensors: dict = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)


class _Few(Pass):
    """A pass through the first block, whose input the network keeps until the last, and one more of each kind. left:
    the bytes that the other blocks would leave behind. output: of one block's output."""

    def __init__(self, kinds: dict[type, list[int]], tracking: Tracking):
        self._kinds, self._tracking = kinds, tracking
        self.left = self.output = 0

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        self.output = tokens.nbytes
        tokens = stack.run(0, tokens)
        for numbers in self._kinds.values():
            if numbers[-1] == 0:  # the only one
                continue
            before, others = self._tracking.now, len(numbers) - 1 - (0 in numbers)
            tokens = stack.run(numbers[-1], tokens)
            self.left += (self._tracking.now - before) * others
        return tokens


def run(asked: DryNetwork, video: DryVideo, rank: DryRank) -> PassBytes:
    """Runs one branch's pass; what the others leave is as much."""
    network, kinds = _network(asked)
    operators = operators_on(rank.kind)
    own = seats(rank.plan, rank.number, copies=rank.kind == "cpu")
    network.arrange(operators, dry_sequence(own, operators, rank.ring_exchange, rank.overlap))
    branch, latent = _branch(asked, video, network.config)
    given = [*network.parameters(), *network.buffers(), latent]
    given += [value for value in vars(branch).values() if isinstance(value, Tensor)]
    sizes = {}

    def compute(tracking: Tracking):
        passing, context = _Few(kinds, tracking), branch.context()
        given_in = _with_all_channels(branch.input(latent), network)
        branch.output(network(given_in, branch.timestep(TIMESTEP), context, passing))
        both = tracking.now
        network.forget()
        sizes.update(tables=both - tracking.now, left=passing.left, output=passing.output)
        return context

    found = allocated(compute, given)
    exchanged = found.at_peak.get(EXCHANGE, 0)
    return PassBytes(
        context=sizes["tables"] + video.branches * (found.kept + sizes["left"]),
        blocks=found.most - found.kept - sizes["tables"] - exchanged,
        exchange=exchanged,
        output=sizes["output"],
    )


def _with_all_channels(given: Tensor, network: nn.Module) -> Tensor:
    """The input [B,C,T,H,W] with the channels that only a sampler outside of the ranks gives, such as a control
    video's."""
    missing = network.config.get("in_channels", 0) - given.shape[1]
    return torch.cat([given, given.new_empty(given.shape[0], missing, *given.shape[2:])], 1) if missing > 0 else given


def units_of(asked: DryNetwork, shards: int) -> tuple[int, list[int]]:
    """(bytes of the weights outside of FSDP's units, bytes of each unit in the order of their use), as gathered from so
    many shards; a nested unit counts with its outer one."""
    network, _ = _network(asked)
    replicated = asked.family.weights.replicated
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    left = {name: parameter for name, parameter in network.named_parameters() if not replicated(name)}
    units = []
    for unit in network.units:
        own = [left.pop(names[id(parameter)], None) for parameter in unit.parameters()]
        units.append(sum(_gathered(parameter, shards) for parameter in own if parameter is not None))
    return sum(_gathered(parameter, shards) for parameter in left.values()), [unit for unit in units if unit]


def _gathered(parameter: Tensor, shards: int) -> int:
    """With the padding of the last shards."""
    rows = -(-parameter.shape[0] // shards) * shards
    return rows * math.prod(parameter.shape[1:]) * parameter.element_size()


@lru_cache(maxsize=8)
def _network(asked: DryNetwork) -> tuple[nn.Module, dict[type, list[int]]]:
    """(the network with a rank's slices, the numbers of its blocks by their kind)"""
    tp, family = dry_tensor_parallel(Seat(asked.tp, 0)), asked.family
    network = family.network(TRANSFORMER, json.loads(asked.config), tp)
    rules, blocks = family.weights, family.parts[TRANSFORMER].blocks
    layers = dict.fromkeys(asked.in_8_bits, QUANTIZATION_SCHEMES["w8a8_dynamic"])
    quantize(network, layers | {name: Layer(kind) for name, kind in asked.packed}, blocks)
    ShardedWeights(Sharding(tp), rules.cut_dim, rules.replicated, network.units).prepare(network)
    fixed = quantized_parameters(network)
    for name, parameter in network.named_parameters():
        wanted = fixed.get(name) or (torch.float32 if rules.fp32(name) else getattr(torch, asked.dtype))
        parameter.requires_grad_(False)
        parameter.data = torch.empty(parameter.shape, dtype=wanted, device="meta")
    nn.Module.to(network, "meta")  # tables of rotary positions
    kinds = defaultdict(list)
    for number, block in enumerate(network.blocks):
        kinds[type(block)].append(number)
    return network.eval(), kinds


def _branch(asked: DryNetwork, video: DryVideo, config) -> tuple[Branch, Tensor]:
    """(one branch, the latent that it reads)"""
    family, dtype, batch = asked.family, getattr(torch, asked.dtype), video.size[0]
    latents = Latents(family.latent_format(config, {}))
    latents.mean, latents.std = latents.mean.to("meta"), latents.std.to("meta")
    pooled = family.pooled_width(config)
    with torch.device("meta"):
        text = torch.empty(1, video.text_tokens, family.text_width(config))
        prompt = _Prompt(text, torch.empty(1, pooled) if pooled else None)
        known = torch.empty(batch, 1, *video.size[2:]) if video.per_token else None
        given = Given(torch.empty(video.size), known, {"positive": prompt})
        branch = family.conditioner(config, latents).branch(prompt, given, torch.device("meta"), dtype)
        return branch, torch.empty(video.size, dtype=dtype)
