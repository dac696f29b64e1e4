"""Reads weights into a network that lies on the meta device, a few pieces at a time, straight to where it is kept."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Protocol

import torch
from torch import nn

from .fp8 import scales_of
from .keys import TOKENIZER_MODEL
from .parts import Part
from .pieces import Wanted, read_in_pieces
from .tensor_files import open_tensors

MAX_NAMES = 8  # how many parameter names an error lists


class Share(Protocol):
    """What is held here of each parameter of a network."""

    def prepare(self, module: nn.Module) -> None:
        """Gives the parameters, on the meta device, the shapes that are held here."""

    def part(self, name: str, shape: tuple[int, ...]) -> Part | None:
        """Which part of a tensor of this shape on disk is held here; None: all of it."""

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
class _Place:
    """Where a parameter lies: shard, name there, shape, and the name of its scale where it was kept in 8 bits."""

    shard: Path
    key: str
    shape: tuple[int, ...]
    scale: str | None


def load_weights(
    module: nn.Module,
    shards: Iterable[Path],
    *,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    rename: Callable[[str, Path], str | None] = lambda name, shard: name,
    share: Share = Whole(),
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fills `module`, on the meta device, with the tensors of `shards`.

    dtype_of: the dtype to keep a parameter in, by name.
    rename: the module's name of a tensor, by its name in a shard; None: it is none of the module's.
    share: what is held here of each; no other byte is read.
    on_tensor: told after each tensor how many are done, and how many there are.

    Nothing is allocated before every name and shape is known to fit. Raises ValueError that lists missing,
    unexpected, wrongly shaped and non-finite tensors by name. Nothing is ever left to chance values.
    """
    shards = tuple(shards)
    places = check_weights(module, shards, rename)
    share.prepare(module)
    done = 0
    for shard in shards:
        wanted = [
            Wanted(name, place.key, place.scale, place.shape, share.part(name, place.shape), dtype_of(name), device)
            for name, place in places.items()
            if place.shard == shard
        ]
        with open_tensors(shard) as file, closing(read_in_pieces(file, wanted)) as tensors:
            for name, tensor in tensors:
                assign(module, name, share.parameter(module, name, tensor))
                done += 1
                on_tensor(done, len(places))


def check_weights(
    module: nn.Module, shards: tuple[Path, ...], rename: Callable[[str, Path], str | None]
) -> dict[str, _Place]:
    """Where each parameter of `module` lies in `shards`. No weight is read. Raises ValueError as `load_weights` does,
    but of values."""
    wanted = module.state_dict(keep_vars=True)
    places = _places(shards, rename)
    _check_fit(module, shards, wanted, places)
    return places


def _places(shards: tuple[Path, ...], rename: Callable[[str, Path], str | None]) -> dict[str, _Place]:
    """Where each parameter is, in the order of the files."""
    places: dict[str, _Place] = {}
    for shard in shards:
        with open_tensors(shard) as file:
            scales, marks = scales_of(file)
            for key, shape in file.shapes.items():
                name = None if key in marks else rename(key, shard)
                if name is None:
                    continue
                if name in places:
                    raise ValueError(f"{shard} and {places[name].shard} both hold {name}. Keep one of the two.")
                file.dtype(key)  # can it be read at all?
                places[name] = _Place(shard, key, tuple(shape), scales.get(key))
    return places


def _check_fit(module, shards, wanted, places) -> None:
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
        raise ValueError(
            f"{shards[0]} does not fit {type(module).__name__}. Tensors {faults}. "
            "Is it another model's file, or a config.json of another model beside it?"
        )


def listed(faults: dict[str, list[str]]) -> str:
    """Names of tensors by what is wrong with them, in words; the first ones of each fault."""
    return "; ".join(
        f"{len(names)} {fault}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
        for fault, names in faults.items()
        if names
    )


def tokenizer_model(file: Path) -> bytes:
    """The sentencepiece model that a file of a text encoder brings along."""
    with open_tensors(file) as tensors:
        return tensors.read(TOKENIZER_MODEL).numpy().tobytes()


def assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Makes `tensor` the parameter or buffer of that name, without a gradient."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
