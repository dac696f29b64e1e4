"""Loads weights into a network on the meta device, a few pieces at a time, directly to where they are kept."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Mapping, Protocol

import torch
from torch import nn

from ..errors import coded_error
from ..ops.packing import Packing
from .codings.coding import Coding, Codings
from .codings.ggml import block_codings
from .codings.kept import KeptWeights
from .codings.recognised import codings_of
from .faults import list_faults
from .formats.parts import Slices
from .formats.tensor_file import TensorFile
from .fused import Rows, Split, Target, row_faults, targets_of
from .msmodelslim import Description
from .opening import open_tensors
from .pieces import Wanted, kept_as_stored, read_in_pieces
from .shards import one_of_several


class LocalWeights(Protocol):
    """Which part of each parameter of a network this rank holds."""

    def prepare(self, module: nn.Module) -> None:
        """Gives the parameters, on the meta device, the shapes that this rank holds."""

    def part(self, name: str, shape: tuple[int, ...]) -> Slices | None:
        """The part of a parameter of this full shape that this rank holds; None: all of it."""

    def parameter(self, module: nn.Module, name: str, part: torch.Tensor) -> torch.Tensor:
        """The parameter to set, from the part that was read."""


class AllWeights:
    """This rank holds all parameters whole."""

    def prepare(self, module: nn.Module) -> None:
        pass

    def part(self, name: str, shape: tuple[int, ...]) -> None:
        return None

    def parameter(self, module: nn.Module, name: str, part: torch.Tensor) -> torch.Tensor:
        return part


@dataclass(frozen=True)
class Place:
    """Where a parameter lies on disk. key: the tensor's name in the shard. shape: the parameter's full shape. nbytes:
    on disk. dtype: of the tensor. coding: how its numbers are stored; None: as torch stores them. packing: how its
    values are kept as bytes, whose shape it has then; None: as numbers.

    rows: its ranges of the tensor's rows, in this order; columns: its range of the tensor's columns; None: all.
    """

    shard: Path
    key: str
    shape: tuple[int, ...]
    nbytes: int
    dtype: torch.dtype
    coding: Coding | None
    rows: Rows | None = None
    columns: slice | None = None
    packing: Packing | None = None

    def is_kept_as_stored(self, dtype: torch.dtype) -> bool:
        """Whether a parameter that is kept in this dtype lies on disk just so: a CPU maps it, if it keeps all of it."""
        return kept_as_stored(dtype, self.dtype, self.coding, self.rows, self.packing)


NO_SCALES: dict[str, str] = {}
Places = dict[str, Place]  # by a network's parameter names, in file order


class BytesRead:
    """Counts the bytes read, of whole tensors on disk, whatever part this rank holds.

    report: called with (bytes done, bytes in total).
    """

    def __init__(self, report: Callable[[int, int], None]):
        self._report = report
        self._done = self._total = 0

    def expect(self, nbytes: int) -> None:
        """Sets the number of bytes that remain to be read."""
        self._total = self._done + nbytes

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._report(self._done, self._total)


def load_weights(
    module: nn.Module,
    places: Places,
    *,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    share: LocalWeights = AllWeights(),
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    scales_of: dict[str, str] = NO_SCALES,
) -> None:
    """Loads the tensors that `check_weights` found into `module`, which is on the meta device.

    dtype_of: the dtype in which a parameter is kept, by name.
    scales_of: the names of the new row scales, for weights that are quantized on the fly.
    share: the part of each parameter that this rank holds; nothing else is read.
    on_bytes: called after each tensor with the bytes of the whole tensor on disk.

    Raises ValueError, which names the tensor, if it cannot be read, or has values that are not finite.
    """
    share.prepare(module)
    for shard in dict.fromkeys(place.shard for place in places.values()):
        wanted = [
            Wanted(name, place.key, place.coding, place.shape, share.part(name, place.shape), dtype_of(name), device,
                   scales_of.get(name), place.rows, place.columns, place.packing)
            for name, place in places.items()
            if place.shard == shard
        ]  # fmt: skip
        with open_tensors(shard) as file, closing(read_in_pieces(file, wanted)) as tensors:
            for name, tensor in tensors:
                assign(module, name, share.parameter(module, name, tensor))
                on_bytes(places[name].nbytes if name in places else 0)


def read_part(name: str, place: Place, part: Slices, dtype: torch.dtype) -> torch.Tensor:
    """A part of a parameter as `load_weights` reads it, on the CPU. Raises ValueError as it does."""
    wanted = Wanted(name, place.key, place.coding, place.shape, part, dtype, torch.device("cpu"), None, place.rows,
                    place.columns, place.packing)  # fmt: skip
    with open_tensors(place.shard) as file, closing(read_in_pieces(file, [wanted])) as tensors:
        ((_, tensor),) = tensors
    return tensor


def check_weights(
    module: nn.Module,
    shards: tuple[Path, ...],
    rename: Callable[[str, Path], str | None] = lambda name, shard: name,
    quantized: Description | None = None,
    split: Split | None = None,
    identify: Callable[[Iterable[str]], str] = lambda names: "",
) -> Places:
    """Finds where each parameter of `module` lies in `shards`. Allocates nothing, and reads no weights.

    rename: (a tensor's name, its shard) -> the module's name; None: the tensor does not belong to the module.
    quantized: the description of the layers that are quantized, in the files and in `module`.
    split: the parameters in a tensor that holds several, or rows in another order.
    identify: a sentence about the network that has these unexpected parameters; empty if unknown.

    Raises ValueError, which lists missing, unexpected and wrongly shaped tensors, and tensors with rows that do not
    belong to exactly one parameter: no parameter is left uninitialised.
    """
    wanted = module.state_dict(keep_vars=True)
    places = _places(shards, rename, quantized, split)
    _check_fit(module, shards, wanted, places, identify)
    return places


def nbytes(places: Places, names: Iterable[str] | None = None) -> int:
    """The bytes on disk of the whole tensors of these names; None: of all."""
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
            codings = _codings(file, own, quantized)
            parts = quantized.parts_in(file) if quantized else {}
            for key, shape in file.shapes.items():
                left_out = key in codings.others or parts.get(key) is False
                name = None if left_out else rename(codings.names.get(key, key), shard)
                if name is None:
                    continue
                dtype = file.dtype(key)
                coding = codings.weights.get(key)
                if not (dtype.is_floating_point or coding or parts.get(key)):
                    numbers.append(f"{key} as {dtype}")
                targets[key] = targets_of(split, name, tuple(shape))
                for one in targets[key]:
                    if one.name in places:
                        other = places[one.name].shard
                        raise coded_error("AV-1310", f"{shard} and {other} both hold {one.name}. Keep one of the two.")
                    made = one.shape_in(tuple(shape))
                    size = math.ceil(math.prod(made) * (coding.bits if coding else 8 * dtype.itemsize) / 8)
                    packing = quantized.packing(key, one.name) if quantized else None
                    kept = packing.shape(made) if packing else made
                    places[one.name] = Place(shard, key, kept, size, dtype, coding, one.rows, one.columns, packing)
            _check_rows(file, targets)
        if faults := list_faults({"that are not floating-point": numbers}):
            raise coded_error(
                "AV-1305", f"{shard} holds tensors {faults}. Use the model's fp32, fp16, bf16 or fp8_scaled form."
            )
    return places


def _codings(file: TensorFile, own: list[str], quantized: Description | KeptWeights | None) -> Codings:
    """How the tensors of a file that belong to the module are stored; a description says it otherwise."""
    if isinstance(quantized, Description):
        return Codings({}, set())
    codings = block_codings(file) or codings_of(file, own)
    return quantized.coded(codings) if isinstance(quantized, KeptWeights) else codings


def _check_rows(file: TensorFile, targets: Mapping[str, tuple[Target, ...]]) -> None:
    """Raises ValueError, which lists tensors with rows or columns that belong to no parameter or to several, and
    tensors with fewer of them than their parameters. targets: the parameters of each tensor."""
    faults = defaultdict(list)
    for key, own in targets.items():
        for fault, which in row_faults(own, file.shapes[key]):
            faults[fault].append(f"{key} {list(file.shapes[key])}, {which}")
    if listed := list_faults(faults):
        raise coded_error(
            "AV-1401", f"{file.path} holds tensors {listed}. Is it another model's file? If not, download it again."
        )


def _check_fit(module, shards, wanted, places, identify) -> None:
    filled = {id(wanted[name]) for name in places if name in wanted}  # one of a shared parameter's names is enough
    missing = [name for name, tensor in wanted.items() if id(tensor) not in filled]
    unexpected = [name for name in places if name not in wanted]
    misshapen = [
        f"{name} is {list(places[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in places and places[name].shape != tuple(tensor.shape)
    ]
    faults = list_faults({"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen})
    if faults:
        hint = identify(unexpected) or (missing and len(shards) == 1 and one_of_several(shards[0]))
        by_config = ", or is the config.json next to it another model's" * (shards[0].parent / "config.json").is_file()
        question = f"Is it another model's file{by_config}?"
        raise coded_error(
            "AV-1401", f"{shards[0]} does not fit {type(module).__name__}. Tensors {faults}. {hint or question}"
        )


def assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Sets the parameter or buffer of this name to `tensor`, without a gradient."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
