"""Reads weights into a network that lies on the meta device, one tensor at a time, straight to where it is kept."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .parts import Parts

MAX_NAMES = 8  # how many parameter names an error lists


@contextmanager
def open_shard(path: Path):
    """The opened .safetensors file; raises ValueError where it is none."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes). Download it again.")
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file ({error}). Download it again.") from None


class Share(Protocol):
    """What is held here of each parameter of a network."""

    def prepare(self, module: nn.Module) -> None:
        """Gives the parameters, on the meta device, the shapes that are held here."""

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
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


def load_weights(
    module: nn.Module,
    shards: Iterable[Path],
    *,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
    share: Share = Whole(),
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fills `module`, on the meta device, with the tensors of `shards`.

    dtype_of: the dtype to keep a parameter in, by name.
    rename: the module's name of a tensor, by its name on disk.
    share: what is held here of each; no other byte is read.
    on_tensor: told after each tensor how many are done, and how many there are.

    Nothing is allocated before every name and shape is known to fit. Raises ValueError that lists missing,
    unexpected, wrongly shaped and non-finite tensors by name. Nothing is ever left to chance values.
    """
    shards = tuple(shards)
    wanted = module.state_dict(keep_vars=True)
    places = _places(shards, rename)
    _check_fit(module, shards, wanted, places)
    share.prepare(module)
    done = 0
    for path in shards:
        with open_shard(path) as shard, Parts(path) as parts:
            for name, (home, key, shape) in places.items():
                if home == path:
                    part, dtype = share.part(name, shape), dtype_of(name)
                    # What is kept as it lies on disk is a view of the mapped file: ranks share its memory.
                    stays = part is None and device.type == "cpu" and parts.dtype(key) == dtype
                    tensor = shard.get_tensor(key) if stays else parts.read(key, part)
                    held = _finite(tensor, name, path).to(device, dtype)
                    assign(module, name, share.parameter(module, name, held))
                    done += 1
                    on_tensor(done, len(places))


def _places(shards: tuple[Path, ...], rename: Callable[[str], str]) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Where each parameter is: shard, key and shape, in the order of the file."""
    places: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in shards:
        with open_shard(path) as shard:
            for key in shard.keys():
                held, name = shard.get_slice(key), rename(key)
                if name in places:
                    raise ValueError(f"{path} and {places[name][0]} both hold {name}. Keep one of the two.")
                if held.get_dtype().startswith("F8"):
                    raise ValueError(f"{path} holds fp8 weights, which cannot be read yet. Take its fp16 or bf16 form.")
                places[name] = (path, key, tuple(held.get_shape()))
    return places


def _check_fit(module, shards, wanted, places) -> None:
    filled = {id(wanted[name]) for name in places if name in wanted}  # a parameter with two names needs one of them
    missing = [name for name, tensor in wanted.items() if id(tensor) not in filled]
    unexpected = [name for name in places if name not in wanted]
    misshapen = [
        f"{name} is {list(places[name][2])}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in places and places[name][2] != tuple(tensor.shape)
    ]
    faults = [
        f"{len(names)} {fault}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
        if names
    ]
    if faults:
        raise ValueError(
            f"{shards[0]} does not fit {type(module).__name__}. Tensors {'; '.join(faults)}. "
            "Is it another model's file, or a config.json of another model beside it?"
        )


def _finite(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    """`tensor`, if its values are numbers: its least and its greatest show it, as NaN is both."""
    if tensor.is_floating_point() and tensor.numel():
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise ValueError(f"{path} has NaN or infinite values in {name}. The file is damaged: download it again.")
    return tensor


def assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Makes `tensor` the parameter or buffer of that name, without a gradient."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
