"""LoRA files: which parameter each of their tensors changes, and how.

A low-rank pair makes a weight W + strength * alpha / rank * B @ A (Hu et al., arXiv 2106.09685), a whole difference D
makes it W + strength * D. The bias of B is a bias' difference, scaled as the product. alpha is in the file, or in what
diffusers and PEFT write with it (lora_scale.py); without one the fraction is 1, as in core ComfyUI.

A LoRA is used without what the model has no place for, with a warning, as in core ComfyUI: layers of another kind or
size of model. A file of which nothing fits is refused, and so is one with anything that could make its sum another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.faults import listed
from ..checkpoints.formats.parts import Part, in_ranges, whole
from ..checkpoints.formats.tensor_files import TensorFile, open_tensors
from ..checkpoints.fused import Rows, count, row_faults, targets_of
from ..checkpoints.states import states
from ..models.family import LoraNames
from ..models.shapes import Shapes
from ..ops.precision import is_finite
from .lora_keys import TWICE, Keys, Understood, module_name, section, understood
from .lora_scale import PEFTS_CONFIG, PEFTS_WEIGHTS, AdapterConfig, adapter_config, config_file

MISSHAPEN = "of the wrong shape"
INCOMPLETE = "that make no change together"
NOT_FINITE = "with NaN or infinite values"
LARGEST_RANK = 16_384  # above the width of any published model, whose difference has no larger one
LARGEST_SCALE = 10_000  # alpha / rank; that of published LoRAs is 16 at most


@dataclass(frozen=True)
class LowRank:
    """up: the key of B [out, rank]; down: that of A [rank, in]; a convolution's have more dims. rows: those of B that
    are the parameter's, where the file's layer holds several; None: all."""

    up: str
    down: str
    scale: float
    rank: int
    rows: Rows | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return self.up, self.down

    @property
    def changes_nothing(self) -> bool:
        return self.scale == 0 or self.rank == 0

    def add_to(self, weight: Tensor, file: TensorFile, part: Part, whole: tuple[int, ...], strength: float):
        """weight: fp32, the part of a tensor of the shape `whole` that is to be changed, in place."""
        up = _read(file, self.up, part[:1], self.rows).flatten(1).to(weight)
        down = file.read(self.down).view(-1, *whole[1:])[(slice(None), *part[1:])].flatten(1).to(weight)
        weight += ((strength * self.scale) * (up @ down)).view_as(weight)


@dataclass(frozen=True)
class Difference:
    """rows: see LowRank."""

    key: str
    scale: float = 1.0
    rows: Rows | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def add_to(self, weight: Tensor, file: TensorFile, part: Part, whole: tuple[int, ...], strength: float):
        weight += (strength * self.scale) * _read(file, self.key, part, self.rows).to(weight)


def _read(file: TensorFile, key: str, part: Part, rows: Rows | None) -> Tensor:
    """A part of what these rows of a tensor make; part: of the first dims, all of the others."""
    part = (*part, *whole(file.shapes[key])[len(part) :])
    pieces = [file.read(key, lies) for _, lies in in_ranges(part, rows)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


Changes = dict[str, LowRank | Difference]  # by diffusers' names of the parameters


@dataclass(frozen=True)
class LoraFile:
    """What a file changes in a network; nothing, where it is for the other expert. Equal while the file stays the same.

    warning: what of it is left out, and why, or what is not known of it; empty where there is nothing to be said.
    """

    fingerprint: tuple
    changes: Changes = field(compare=False)
    warning: str = field(default="", compare=False)

    @property
    def path(self) -> Path:
        return Path(self.fingerprint[0])


def fingerprint(path: str) -> tuple:
    """Changes when the file does, or PEFT's configuration next to it. Raises ValueError where there is none."""
    if not Path(path).is_file():
        raise ValueError(
            f"There is no LoRA {path}. Give the path of a .safetensors file; ComfyUI's LoRAs belong into models/loras."
        )
    state, config = Path(path).stat(), config_file(Path(path))
    return path, state.st_size, state.st_mtime_ns, config and states((config,))


def read_lora(path: str | Path, shapes: Shapes, names: LoraNames, expert: str | None = None) -> LoraFile:
    """What the file changes of a network whose parameters have these whole shapes.

    names: those of its family. expert: which of two it is, "high_noise" or "low_noise"; None: there is only one.

    Raises ValueError where no layer of the file fits, and where something in it is of a format that is not merged, of
    no known kind, incomplete, not finite or of whole numbers: each by name.
    """
    state, path = fingerprint(str(path)), Path(path)
    with open_tensors(path) as file:
        known = shapes | dict.fromkeys(names.fused, ())
        found = understood(file.shapes, known, names, expert)
        _refuse_other_formats(path, found.other_formats)
        for key in file.shapes:
            if not (file.dtype(key).is_floating_point or key.endswith(".alpha")):
                found.faults["that are no floating-point numbers"].append(f"{key} as {file.dtype(key)}")
        changes = _split(_changes(file, found, known), file.shapes, names, found.faults)
        changes, misfits = _fitting(changes, file.shapes, shapes, found.left_out)
        if not found.faults:
            used = dict.fromkeys(key for change in changes.values() for key in change.keys)
            found.faults[NOT_FINITE] += [key for key in used if not is_finite(file.read(key).float())]
        _refuse_faults(path, found.faults, bool(file.shapes))
        reason = names.made_for(misfits, shapes, found.left_out)
        if not changes and (found.layers or not found.other_expert):
            raise ValueError(
                f"{path} is no LoRA for this model: none of its {len(file.shapes)} tensors fits. {reason}"
                f"Tensors {listed(found.left_out)}. Nothing was changed. Take a LoRA that was made for this model."
            )
        return LoraFile(state, changes, _warning(path, found, reason, changes))


def _changes(file: TensorFile, found: Understood, shapes: Shapes) -> Changes:
    """What all keys together change, whether it fits or not."""
    changes: Changes = {}
    config_of = cache(lambda section: adapter_config(file, section))
    for layer, keys in found.layers.items():
        weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
        of_weight = keys.keys() - {"diff_b"}
        scale = 1.0
        if {"up", "down"} <= of_weight <= {"up", "down", "alpha", "up_bias"}:
            scale = _scale(file, layer, keys, config_of, found.faults)
            if math.isfinite(scale) and abs(scale) > LARGEST_SCALE:
                said = f"{keys.get('alpha', keys['up'])} by {scale:g}"
                found.faults[f"that change a model by more than {LARGEST_SCALE:,} times their product"].append(said)
            changes[weight] = LowRank(keys["up"], keys["down"], scale, rank=(*file.shapes[keys["down"]], 0)[0])
        elif of_weight == {"diff"}:
            changes[weight] = Difference(keys["diff"])
        elif of_weight:
            given = " and ".join(keys[role] for role in keys if role in of_weight)
            found.faults[INCOMPLETE].append(f"{given} (of {weight})")
        if "up_bias" in keys:
            changes[f"{layer}.bias"] = Difference(keys["up_bias"], scale)
        if "diff_b" in keys and "up_bias" in keys:
            found.faults[TWICE].append(f"{keys['up_bias']} and {keys['diff_b']}")
        elif "diff_b" in keys:
            changes[f"{layer}.bias"] = Difference(keys["diff_b"])
    return changes


def _split(changes: Changes, on_disk: Shapes, names: LoraNames, faults: Keys) -> Changes:
    """The same by the network's parameters, each with its rows of what the file changes."""
    split: Changes = {}
    for name, change in changes.items():
        shape = _shape_of(change, on_disk)
        targets = targets_of(names.split, name, shape)
        for fault, which in row_faults(targets, shape):
            faults[fault].append(f"{change.keys[0]} {list(on_disk[change.keys[0]])}, {which}")
        for one in targets:
            if one.name in split:
                faults[TWICE].append(f"{split[one.name].keys[0]} and {change.keys[0]} (of {one.name})")
            split[one.name] = replace(change, rows=one.rows)
    return split


def _scale(
    file: TensorFile, layer: str, keys: dict[str, str], config_of: Callable[[str], AdapterConfig | None], faults: Keys
) -> float:
    """alpha / rank of a pair."""
    up, down = file.shapes[keys["up"]], file.shapes[keys["down"]]
    if not up or not down or math.prod(up[1:]) != down[0]:
        faults[INCOMPLETE].append(f"{keys['up']} {list(up)} and {keys['down']} {list(down)}")
        return 1.0
    rank = max(1, down[0])
    if "alpha" not in keys:
        config = config_of(section(keys["up"]))
        return 1.0 if config is None else config.scale((module_name(keys["up"]), layer), rank)
    shape, dtype = file.shapes[keys["alpha"]], file.dtype(keys["alpha"])
    if math.prod(shape) != 1:
        faults[MISSHAPEN].append(f"{keys['alpha']} is {list(shape)}, not one number")
        return 1.0
    if dtype == torch.bool or dtype.is_complex:
        faults["that are to be numbers"].append(f"{keys['alpha']} as {dtype}")
        return 1.0
    alpha = file.read(keys["alpha"]).item()
    if not math.isfinite(alpha):
        faults[NOT_FINITE].append(keys["alpha"])
    return alpha / rank


def _fitting(
    changes: Changes, on_disk: Shapes, shapes: Shapes, left_out: Keys
) -> tuple[Changes, dict[str, tuple[int, ...]]]:
    """(the changes that fit, the shapes of what the others would change); `left_out` gets the keys of these."""
    fitting, misfits = {}, {}
    for name, change in changes.items():
        whole, own = shapes.get(name), _shape_of(change, on_disk)
        fits = _multiplies_to(change, on_disk, whole) if whole and isinstance(change, LowRank) else own == whole
        if fits:
            fitting[name] = change
            continue
        given = " and ".join(f"{key} {list(on_disk[key])}" for key in change.keys)
        left_out[MISSHAPEN].append(f"{given} for {name} {'which is not there' if whole is None else list(whole)}")
        misfits[name] = own
    return fitting, misfits


def _shape_of(change: LowRank | Difference, on_disk: Shapes) -> tuple[int, ...]:
    """Of what it changes, if that is to fit."""
    first = on_disk[change.keys[0]]
    rows = first[:1] if change.rows is None else (count(change.rows),)
    return (*rows, *(first if isinstance(change, Difference) else on_disk[change.down])[1:])


def _multiplies_to(change: LowRank, on_disk: Shapes, whole: tuple[int, ...]) -> bool:
    up, down = on_disk[change.up], on_disk[change.down]
    matrices = min(len(up), len(down), len(whole)) > 1 and down[0] <= LARGEST_RANK
    return matrices and (_shape_of(change, on_disk)[0], math.prod(down[1:])) == (whole[0], math.prod(whole[1:]))


def _warning(path: Path, found: Understood, reason: str, changes: Changes) -> str:
    said = []
    if found.left_out:
        said.append(f"The LoRA {path} is used without some of its tensors: {listed(found.left_out)}. {reason}".strip())
    idle = [name for name, change in changes.items() if isinstance(change, LowRank) and change.changes_nothing]
    if idle:
        said.append(
            f"The LoRA {path} leaves as they are {listed({'weights, as alpha or the rank is 0': idle})}. Was it "
            "trained to its end? Take the file as its trainer has written it."
        )
    without = _pairs_without_alpha(found)
    of_peft = path.stem == PEFTS_WEIGHTS or any(key.startswith("base_model.model.") for key in without)
    if of_peft and changes and without and config_file(path) is None:
        said.append(
            f"The LoRA {path} was written by PEFT, which keeps alpha in {PEFTS_CONFIG}: it is merged as if alpha were "
            f"its rank, which may be another strength than its trainer's. Put {PEFTS_CONFIG} next to it, and name it "
            f"{PEFTS_WEIGHTS}{path.suffix}."
        )
    return " ".join(said)


def _pairs_without_alpha(found: Understood) -> list[str]:
    return [keys["up"] for keys in found.layers.values() if "up" in keys and "alpha" not in keys]


def _refuse_other_formats(path: Path, formats: Keys) -> None:
    """Raises ValueError where there are some."""
    if formats:
        raise ValueError(
            f"{path} cannot be merged here. Tensors {listed({f'of {name}': keys for name, keys in formats.items()})}. "
            "Nothing was changed. Take a LoRA of low-rank pairs, or a model into which the software that made this "
            "file has merged it."
        )


def _refuse_faults(path: Path, faults: Keys, holds_some: bool) -> None:
    """Raises ValueError where there is a fault, or nothing in the file."""
    said = listed(faults)
    if said or not holds_some:
        raise ValueError(
            f"{path} is no LoRA for this model. Tensors {said or 'there are none'}. Nothing was changed. "
            "Take a LoRA of this model in the layout of diffusers, kohya or ComfyUI (low-rank pairs with or "
            "without alpha, whole differences)."
        )
