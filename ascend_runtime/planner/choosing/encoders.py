"""Where text encoders run, if the user leaves it open: on the CPU of one rank, or on the devices of all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from ..crossing import gathered_seconds
from ..facts import ITEMSIZES, Machine, Network
from ..rates import Rates
from ..timing.work import encoding_flops

CPU, RANKS = "cpu", "ranks"
TOKENS = 512  # of a prompt
DTYPE = "bfloat16"
WORKING = 1.2  # what kernels and activations of a prompt take, of the gathered units
_UNIT = re.compile(r"(.*?\.\d+)\.")  # of a parameter's name: the block that it is in


def place(encoders: Sequence[Network], machine: Machine, rates: Rates) -> str:
    """CPU or RANKS: where a prompt is encoded sooner, of the places that have room.

    machine: what is free next to all that is loaded already. Where neither has room it is the CPU.
    """
    if bytes_on_ranks(encoders, machine.ranks) > machine.device_memory:
        return CPU
    if sum(map(_bytes, encoders)) > machine.host_memory:
        return RANKS
    flops, costs = sum(encoding_flops(one, TOKENS) for one in encoders), rates.on(machine.host_ranks)
    on_ranks = flops * costs["encode_ranks"] / machine.ranks + gathered_seconds(encoders, DTYPE, machine)
    return RANKS if on_ranks < flops * costs["encode"] else CPU


def bytes_on_ranks(encoders: Sequence[Network], ranks: int) -> int:
    """Bytes that encoders take of each device: shards of their weights, and two gathered units of the largest one."""
    gathered = max(2 * _largest_unit(one) for one in encoders) if ranks > 1 else 0
    return int(sum(map(_bytes, encoders)) / ranks + WORKING * gathered)


def _bytes(network: Network) -> int:
    return ITEMSIZES[DTYPE] * network.numbers


def _largest_unit(network: Network) -> int:
    """Bytes of the largest block, or of the largest parameter outside of blocks, such as the table of embeddings."""
    units = Counter()
    for name, shape in network.shapes.items():
        block = _UNIT.match(name)
        units[block[1] if block else name] += ITEMSIZES[DTYPE] * math.prod(shape)
    return max(units.values())
