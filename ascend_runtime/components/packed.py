"""Decides whether the weights of GGUF files stay in blocks on this rank."""

from __future__ import annotations

import logging
import math

import torch

from ..checkpoints.codings.packed import PackedWeights
from ..hardware import devices
from ..models.shared.quantized.replacing import linears
from ..ops.blocks.ggml import BLOCK_TYPES, BlockType
from ..recognition.component import Component
from ..recognition.packed import weights_in_blocks, with_packed
from ..specs import DiffusionModelSpec
from .networks import empty_network
from .room import Room

logger = logging.getLogger(__name__)


def keep_packed(
    found: list[Component], spec: DiffusionModelSpec, room: Room, dtype: torch.dtype
) -> tuple[list[Component], tuple[str, ...]]:
    """(the experts, with the weights in blocks that are to stay in them; a sentence about these for the user, if any).

    A spec that leaves it open is decided by this rank's memory. Ranks that share weights must hold them in one way, and
    keep them in blocks, as each would decide by its own memory. A job on ranks is decided beforehand, by its plan.
    """
    if spec.packed is False or spec.quantization != "none":
        return found, ()
    networks = [empty_network(one) for one in found]
    weights = [weights_in_blocks(one, linears(network, lambda name: True)) for one, network in zip(found, networks)]
    if not any(weights):
        return found, ()
    shapes = [{name: tuple(x.shape) for name, x in network.named_parameters()} for network in networks]
    if spec.packed is None:
        numbers = (math.prod(shape) for of_one in shapes for shape in of_one.values())
        shared = room.sharding.mesh is not None or room.sharding.tp.degree > 1
        if not shared and _fits(dtype.itemsize * sum(numbers), room):
            return found, ()
    degree = room.sharding.tp.degree
    made = [with_packed(one, *facts, degree) for one, *facts in zip(found, weights, shapes)]
    sizes = [(BLOCK_TYPES[kind], shape[f"{name}.weight"])
             for one, shape in zip(made, shapes) if isinstance(one.quantized, PackedWeights)
             for name, kind in one.quantized.layers.items()]  # fmt: skip
    return made, _note(sizes, dtype) if sizes else ()


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


def _note(sizes: list[tuple[BlockType, tuple[int, ...]]], dtype: torch.dtype) -> tuple[str, ...]:
    kinds = ", ".join(sorted({kind.name for kind, _ in sizes}))
    kept = sum(math.prod(kind.shape(shape)) for kind, shape in sizes)
    full = dtype.itemsize * sum(math.prod(shape) for _, shape in sizes)
    note = (
        f"Weights of the blocks stay as the GGUF file has them ({kinds}): {kept / 1e9:.2g} GB instead of "
        f"{full / 1e9:.2g}. Each layer is dequantized when it is used, which takes a little time in each step."
    )
    logger.info("%s", note)
    return (note,)
