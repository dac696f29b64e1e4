"""Decides whether the weights of GGUF files stay in blocks on this rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch

from ..hardware import devices
from ..models.shared.quantized.replacing import linears
from ..checkpoints.codings.packed import PackedWeights
from ..recognition.component import Component
from ..recognition.packed import weights_in_blocks, with_packed
from ..specs import DiffusionModelSpec
from .networks import empty_network
from .room import Room

logger = logging.getLogger(__name__)


def packed(found: list[Component], spec: DiffusionModelSpec, room: Room, dtype: torch.dtype) -> list[Component]:
    """The experts, with the weights in blocks that are to stay in them.

    A spec that leaves it open is decided by this rank's memory. Ranks that share weights must hold them in one way: they
    keep them in blocks, as a decision of each would depend on its own memory. Jobs on ranks are decided beforehand, by
    the plan.
    """
    if spec.packed is False or spec.quantization != "none":
        return found
    networks = [empty_network(one) for one in found]
    weights = [weights_in_blocks(one, linears(network, lambda name: True)) for one, network in zip(found, networks)]
    if not any(weights):
        return found
    shapes = [{name: tuple(x.shape) for name, x in network.named_parameters()} for network in networks]
    if spec.packed is None:
        numbers = (math.prod(shape) for of_one in shapes for shape in of_one.values())
        shared = room.sharding.mesh is not None or room.sharding.tp.degree > 1
        if not shared and _fits(dtype.itemsize * sum(numbers), room):
            return found
    degree = room.sharding.tp.degree
    return [with_packed(one, *facts, degree) for one, *facts in zip(found, weights, shapes)]


def _fits(needed: int, room: Room) -> bool:
    """Whether weights of so many bytes fit on this rank, next to what it computes in; logs what follows."""
    if room.device.type == "cpu":
        fits = room.host_memory.has(needed)
    else:
        fits = devices.room(room.device) >= needed + room.computing
    logger.info(
        "The weights of the GGUF file %s: in full they take %.1f GB, and %.1f GB are needed to compute in.",
        "are dequantized when they are read" if fits else "stay in blocks", needed / 1e9, room.computing / 1e9,
    )  # fmt: skip
    return fits


def note_of(found: Iterable[Component]) -> tuple[str, ...]:
    """A sentence for the user about weights in blocks; empty if there are none."""
    kept = [one.quantized for one in found if isinstance(one.quantized, PackedWeights)]
    if not kept:
        return ()
    kinds = ", ".join(sorted({kind for one in kept for kind in one.algorithms}))
    return (
        f"The weights stay as the GGUF file has them ({kinds}), since they would take too much memory in full: each layer "
        "is dequantized when it is used, which takes a little time in each step.",
    )
