"""Runs a transformer's pass on the meta device."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..models.family import TRANSFORMER, Family
from ..models.shared.block_stack import BlockStack, Pass
from ..models.shared.conditioning import Branch, Given
from ..models.shared.latents import Latents
from ..models.shared.quantized import QUANTIZATION_SCHEMES, quantize, quantized_parameters
from ..ops.memory import Tracking, allocated
from ..parallel.dry import EXCHANGE, Seat, dry_sequence, dry_tensor_parallel
from ..parallel.fsdp import ShardedWeights, Sharding
from .kernels import operators_on
from .passes import TIMESTEP, PassBytes, Question


@dataclass(frozen=True, eq=False)
class _Prompt:
    """See models.shared.conditioning.Prompt."""

    text: Tensor
    pooled: Tensor | None
    concat_latent = concat_mask = clip_vision = None
    tensors: dict = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)


class _Few(Pass):
    """A pass through the first block, whose input the network keeps until the last, and one more of each kind. kept:
    the bytes that each block leaves behind, all blocks together."""

    def __init__(self, kinds: dict[type, list[int]], tracking: Tracking):
        self._kinds, self._tracking = kinds, tracking
        self.kept = self.output = 0

    def blocks(self, stack: BlockStack, tokens: Tensor) -> Tensor:
        self.output = tokens.nbytes
        tokens = stack.run(0, tokens)
        for numbers in self._kinds.values():
            before = self._tracking.now
            tokens = stack.run(numbers[-1], tokens)
            self.kept += (self._tracking.now - before) * (len(numbers) - 1)
        return tokens


@lru_cache(maxsize=512)
def run(question: Question) -> PassBytes:
    """Runs one branch's pass; what the others keep is as much."""
    network, kinds = _network(
        question.family, question.config, question.dtype, question.in_8_bits, Seat(question.plan.tp, 0)
    )
    operators = operators_on(question.kind)
    network.arrange(
        operators,
        dry_sequence(question.plan, question.rank, operators, question.ring_exchange, question.overlap),
    )
    branch, latent = _branch(question, network.config)
    given = [*network.parameters(), *network.buffers(), latent]
    given += [value for value in vars(branch).values() if isinstance(value, Tensor)]
    sizes = {}

    def compute(tracking: Tracking):
        passing, context = _Few(kinds, tracking), branch.context()
        branch.output(network(branch.input(latent), branch.timestep(TIMESTEP), context, passing))
        both = tracking.now
        network.forget()
        sizes.update(tables=both - tracking.now, more=passing.kept, output=passing.output)
        return context

    found = allocated(compute, given)
    kept = found.kept + sizes["tables"]
    return PassBytes(
        context=sizes["tables"] + question.branches * (found.kept + sizes["more"]),
        blocks=found.most - kept - found.at_peak.get(EXCHANGE, 0),
        exchange=found.at_peak.get(EXCHANGE, 0),
        output=sizes["output"],
    )


@lru_cache(maxsize=8)
def _network(
    family: Family, config: str, dtype: str, in_8_bits: frozenset[str], seat: Seat
) -> tuple[nn.Module, dict[type, list[int]]]:
    """(the network with this rank's slices, the numbers of its blocks by their kind)"""
    tp = dry_tensor_parallel(seat)
    network = family.network(TRANSFORMER, json.loads(config), tp)
    rules, blocks = family.weights, family.parts[TRANSFORMER].blocks
    quantize(network, dict.fromkeys(in_8_bits, QUANTIZATION_SCHEMES["w8a8_dynamic"]), blocks)
    ShardedWeights(Sharding(tp), rules.cut_dim, rules.replicated, network.units).prepare(network)
    fixed = quantized_parameters(network)
    for name, parameter in network.named_parameters():
        wanted = fixed.get(name) or (torch.float32 if rules.fp32(name) else getattr(torch, dtype))
        parameter.requires_grad_(False)
        parameter.data = torch.empty(parameter.shape, dtype=wanted, device="meta")
    nn.Module.to(network, "meta")  # tables of rotary positions
    kinds = defaultdict(list)
    for number, block in enumerate(network.blocks):
        kinds[type(block)].append(number)
    return network.eval(), kinds


def _branch(question: Question, config) -> tuple[Branch, Tensor]:
    """(one branch, the latent that it reads)"""
    family, dtype = question.family, getattr(torch, question.dtype)
    latents = Latents(family.latent_format(config, {}))
    latents.mean, latents.std = latents.mean.to("meta"), latents.std.to("meta")
    pooled, mask = family.pooled_width(config), (question.size[0], 1, *question.size[2:])
    with torch.device("meta"):
        text = torch.empty(1, question.text_tokens, family.text_width(config))
        prompt = _Prompt(text, torch.empty(1, pooled) if pooled else None)
        known = torch.empty(mask) if question.per_token else None
        given = Given(torch.empty(question.size), known, {"positive": prompt})
        branch = family.conditioner(config, latents).branch(prompt, given, torch.device("meta"), dtype)
        return branch, torch.empty(question.size, dtype=dtype)
