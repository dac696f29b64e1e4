"""Reads weights into a network that lies on the meta device, a few pieces at a time, straight to where it is kept."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Protocol

import torch
from torch import nn

from .faults import listed
from .formats.parts import Part
from .formats.tensor_files import open_tensors
from .fp8 import refuse_other_scales, scales_of
from .fused import Rows, Split, Target, check_rows, targets_of
from .msmodelslim import Description
from .pieces import Wanted, read_in_pieces
from .shards import one_of_several


class Share(Protocol):
    """What is held here of each parameter of a network."""

    def prepare(self, module: nn.Module) -> None:
        """Gives the parameters, on the meta device, the shapes that are held here."""

    def part(self, name: str, shape: tuple[int, ...]) -> Part | None:
        """Which part of a parameter of this whole shape is held here; None: all of it."""

    def parameter(self, module: nn.Module, name: str, part: torch.Tensor) -> torch.Tensor:
        """The parameter to be set, of the part that was read."""


class Whole:
    """All is held here."""

    def prepare(self, module: nn.Module) -> None:
        pass

    def part(self, name: str, shape: tuple[int, ...]) -> None:
        return None

    def parameter(self, module: nn.Module, name: str, part: torch.Tensor) -> torch.Tensor:
        return part


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: shard, name there, whole shape, bytes there, and the name of its scale where it was kept
    in 8 bits.

    rows: the ranges that make it up, in this order, of the rows of the tensor there; None: all of it.
    """

    shard: Path
    key: str
    shape: tuple[int, ...]
    nbytes: int
    scale: str | None
    rows: Rows | None = None


NOTHING: dict[str, str] = {}
Places = dict[str, Place]  # by the names of a network's parameters, in the order of the files


class ReadProgress:
    """Tells how many bytes are done, and how many there are: of whole tensors on disk, whatever part is held here."""

    def __init__(self, tell: Callable[[int, int], None]):
        self._tell = tell
        self._done = self._total = 0

    def expect(self, nbytes: int) -> None:
        """From now on, so many are still to come."""
        self._total = self._done + nbytes

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._tell(self._done, self._total)


def load_weights(
    module: nn.Module,
    places: Places,
    *,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    share: Share = Whole(),
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    scales_of: dict[str, str] = NOTHING,
) -> None:
    """Fills `module`, on the meta device, with the tensors that `check_weights` found.

    dtype_of: the dtype to keep a parameter in, by name.
    scales_of: of the weights which are quantized row by row as they are read, the names of the scales that this makes.
    share: what is held here of each; no other byte is read.
    on_bytes: told after each tensor how many bytes the whole of it has on disk.

    Raises ValueError that names a tensor which cannot be read, or has values that are no numbers.
    """
    share.prepare(module)
    for shard in dict.fromkeys(place.shard for place in places.values()):
        wanted = [
            Wanted(name, place.key, place.scale, place.shape, share.part(name, place.shape), dtype_of(name), device,
                   scales_of.get(name), place.rows)
            for name, place in places.items()
            if place.shard == shard
        ]  # fmt: skip
        with open_tensors(shard) as file, closing(read_in_pieces(file, wanted)) as tensors:
            for name, tensor in tensors:
                assign(module, name, share.parameter(module, name, tensor))
                on_bytes(places[name].nbytes if name in places else 0)


def check_weights(
    module: nn.Module,
    shards: tuple[Path, ...],
    rename: Callable[[str, Path], str | None] = lambda name, shard: name,
    quantized: Description | None = None,
    split: Split | None = None,
    identify: Callable[[Iterable[str]], str] = lambda names: "",
) -> Places:
    """Where each parameter of `module` lies in `shards`. Nothing is allocated, and no weight is read.

    rename: the module's name of a tensor, by its name in a shard; None: it is none of the module's.
    quantized: what is said of layers that lie there quantized, as they are in `module`.
    split: the module's parameters that such a tensor holds, where it holds several, or rows in another order.
    identify: what a network with these further parameters is, in a sentence; empty where that is not known.

    Raises ValueError that lists missing, unexpected and wrongly shaped tensors by name, and tensors with rows that do
    not belong to one parameter each: nothing is ever left to chance values.
    """
    wanted = module.state_dict(keep_vars=True)
    places = _places(shards, rename, quantized, split)
    _check_fit(module, shards, wanted, places, identify)
    return places


def nbytes(places: Places, names: Iterable[str] | None = None) -> int:
    """On disk, of the whole tensors of these names; None: of all."""
    return sum(places[name].nbytes for name in (places if names is None else names))


def _places(
    shards: tuple[Path, ...], rename: Callable[[str, Path], str | None], quantized: Description | None,
    split: Split | None,
) -> Places:  # fmt: skip
    places: Places = {}
    for shard in shards:
        numbers: list[str] = []
        targets: dict[str, tuple[Target, ...]] = {}
        with open_tensors(shard) as file:
            own = [key for key in file.shapes if rename(key, shard) is not None]
            scales, marks = scales_of(file, own)
            parts = quantized.parts_in(file) if quantized else {}
            if not (quantized or scales):
                refuse_other_scales(file, own)
            for key, shape in file.shapes.items():
                name = None if key in marks or parts.get(key) is False else rename(key, shard)
                if name is None:
                    continue
                dtype = file.dtype(key)
                if not (dtype.is_floating_point or parts.get(key)):
                    numbers.append(f"{key} as {dtype}")
                targets[key] = targets_of(split, name, tuple(shape))
                for name, made, rows in ((one.name, one.shape_in(tuple(shape)), one.rows) for one in targets[key]):
                    if name in places:
                        raise ValueError(f"{shard} and {places[name].shard} both hold {name}. Keep one of the two.")
                    places[name] = Place(shard, key, made, math.prod(made) * dtype.itemsize, scales.get(key), rows)
            check_rows(file, targets)
        if told := listed({"that are no floating-point numbers": numbers}):
            raise ValueError(f"{shard} holds tensors {told}. Take its fp32, fp16, bf16 or fp8_scaled form.")
    return places


def _check_fit(module, shards, wanted, places, identify) -> None:
    filled = {id(wanted[name]) for name in places if name in wanted}  # a parameter with two names needs one of them
    missing = [name for name, tensor in wanted.items() if id(tensor) not in filled]
    unexpected = [name for name in places if name not in wanted]
    misshapen = [
        f"{name} is {list(places[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in places and places[name].shape != tuple(tensor.shape)
    ]
    faults = listed({"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen})
    if faults:
        said = identify(unexpected) or (missing and len(shards) == 1 and one_of_several(shards[0]))
        by_config = ", or is the config.json next to it another model's" * (shards[0].parent / "config.json").is_file()
        asked = f"Is it another model's file{by_config}?"
        raise ValueError(f"{shards[0]} does not fit {type(module).__name__}. Tensors {faults}. {said or asked}")


def assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Makes `tensor` the parameter or buffer of that name, without a gradient."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
