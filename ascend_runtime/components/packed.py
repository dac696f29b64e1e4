"""Decides whether weights in few bits stay as their files have them on this rank: in blocks of GGUF, or in ComfyUI's
formats.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..checkpoints.codings.kept import KeptWeights
from ..checkpoints.codings.layouts import FP8_FORMATS
from ..checkpoints.codings.packed import PackedWeights
from ..checkpoints.msmodelslim import DYNAMIC, MXFP8
from ..hardware import devices
from ..models.shared.quantized.replacing import linears
from ..ops import check_quantized
from ..ops.blocks.ggml import BLOCK_TYPES, BlockType
from ..parallel.fsdp import shards_no_integers
from ..recognition.component import Component
from ..recognition.few_bits import formats_of, with_few_bits
from ..recognition.packed import weights_in_blocks, with_packed
from ..specs import DiffusionModelSpec
from .networks import empty_network
from .room import Room

logger = logging.getLogger(__name__)
PRODUCT_NAMES = {DYNAMIC: "int8", MXFP8: "MXFP8"}  # as users name them


def keep_packed(
    found: list[Component], spec: DiffusionModelSpec, room: Room, dtype: torch.dtype
) -> tuple[list[Component], tuple[str, ...]]:
    """(the experts, with the weights in blocks that are to stay in them; a sentence about these for the user, if any).

    A spec that leaves it open is decided by this rank's memory. Ranks that share weights must hold them in one way, and
    keep them in blocks, as each would decide by its own memory. A job on ranks is decided beforehand, by its plan.
    """
    sharded = room.sharding.mesh is not None
    if spec.packed is False or spec.quantization != "none" or spec.packed is None and sharded and shards_no_integers():
        return found, ()
    weights = [weights_in_blocks(one, partial(_linears_of, one)) for one in found]
    if not any(weights):
        return found, ()
    networks = [empty_network(one) for one in found]
    shapes = [{name: tuple(x.shape) for name, x in network.named_parameters()} for network in networks]
    if spec.packed is None:
        numbers = (math.prod(shape) for of_one in shapes for shape in of_one.values())
        if not (sharded or room.sharding.tp.degree > 1) and _fits(dtype.itemsize * sum(numbers), room):
            return found, ()
    degree = room.sharding.tp.degree
    made = [with_packed(one, *facts, degree) for one, *facts in zip(found, weights, shapes)]
    sizes = [(BLOCK_TYPES[kind], shape[f"{name}.weight"])
             for one, shape in zip(made, shapes) if isinstance(one.quantized, PackedWeights)
             for name, kind in one.quantized.layers.items()]  # fmt: skip
    return made, _note(sizes, dtype) if sizes else ()


def kept_in_few_bits(
    found: list[Component], spec: DiffusionModelSpec, room: Room, dtype: torch.dtype
) -> tuple[list[Component], tuple[str, ...]]:
    """(the experts, whose layers keep ComfyUI's marked weights where the device has the products; a sentence about
    these, and about others that are dequantized, for the user). Nothing is said about fp8."""
    plain = [one for one in found if one.quantized is None]
    formats = sorted({name for one in plain for name in formats_of(one)} - set(FP8_FORMATS))
    if not formats:
        return found, ()
    made, computes = found, partial(_computes, room.device, dtype)
    if spec.packed is not False and not (room.sharding.mesh is not None and shards_no_integers()):
        made = [one if one.quantized is not None else _with_few_bits(one, computes, room.sharding.tp.degree)
                for one in found]  # fmt: skip
    return made, _note_of_formats(formats, made, dtype)


def _with_few_bits(component: Component, computes: Callable[[str], bool], tp: int) -> Component:
    return with_few_bits(component, _linears_of(component), computes, tp)


def _linears_of(component: Component) -> Iterable[str]:
    return linears(empty_network(component), lambda name: True)


def _computes(device: torch.device, dtype: torch.dtype, algorithm: str) -> bool:
    """Whether a device has the products of an algorithm. Those in MXFP8 are only on NPUs: elsewhere they would be made
    of numbers in fp32."""
    if algorithm == MXFP8 and device.type != "npu":
        return False
    try:
        check_quantized(device, dtype, [algorithm])
    except ValueError:
        return False
    return True


def _note_of_formats(formats: list[str], made: list[Component], dtype: torch.dtype) -> tuple[str, ...]:
    kept_ones = [one.quantized for one in made if isinstance(one.quantized, KeptWeights)]
    counts = Counter(layer.algorithm for one in kept_ones for layer in one.layers.values())
    said = [f"{count} linear layers compute in {PRODUCT_NAMES[name]}" for name, count in sorted(counts.items())]
    which = "the other weights are" if said else "the weights are"
    said.append(f"{which} read as {str(dtype).removeprefix('torch.')}")
    note = f"The model's weights are stored as {', '.join(formats)}: {', '.join(said)}."
    logger.info("%s", note)
    return (note,)


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
        f"Weights of the transformer stay as the GGUF file has them ({kinds}): {kept / 1e9:.2g} GB instead of "
        f"{full / 1e9:.2g}. Each layer is dequantized when it is used, which takes a little time in each step."
    )
    logger.info("%s", note)
    return (note,)
