"""Reads LoRA files: which parameter each of their tensors changes, and how.

A low-rank pair changes a weight W to W + strength * alpha / rank * B @ A (Hu et al., arXiv 2106.09685), a full
difference D changes it to W + strength * D. The bias of B changes the layer's bias, with the scale of the product.
alpha is in the file, or in the metadata that diffusers and PEFT write with it (lora_scale.py); without it alpha / rank
is 1, as in core ComfyUI.

Layers that this model lacks, or that have another size here, are left out with a warning, as in core ComfyUI. A file
that does not fit at all is rejected, and so is a file with tensors that may change the result in an unknown way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.faults import list_faults
from ..checkpoints.formats.parts import Slices, full_slices, in_ranges
from ..checkpoints.formats.tensor_files import TensorFile, open_tensors
from ..checkpoints.fused import Rows, Target, row_faults, targets_of
from ..checkpoints.states import states
from ..models.family import LoraNames
from ..models.shapes import Shapes
from ..ops.precision import is_finite
from .lora_keys import TWICE, Keys, ParsedKeys, module_name, parse_keys, section
from .lora_scale import PEFTS_CONFIG, PEFTS_WEIGHTS, AdapterConfig, adapter_config, config_file

MISSHAPEN = "of the wrong shape"
INCOMPLETE = "that make no complete change"
NOT_FINITE = "with NaN or infinite values"
MAX_RANK = 16_384  # above the width of any published model, which bounds the rank of a change
MAX_SCALE = 10_000  # alpha / rank; at most 16 in published LoRAs


@dataclass(frozen=True)
class LowRank:
    """up: the key of B [out, rank]; down: the key of A [rank, in]; those of a convolution have more dims. rows,
    columns: the rows of B and the columns of A that belong to the parameter, if the file's layer holds several
    parameters; None: all."""

    up: str
    down: str
    scale: float
    rank: int
    rows: Rows | None = None
    columns: slice | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return self.up, self.down

    @property
    def changes_nothing(self) -> bool:
        return self.scale == 0 or self.rank == 0

    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: tuple[int, ...], strength: float):
        """Adds the change to `weight` in place: in fp32, the slices `part` of a parameter of the shape `whole`."""
        up = _read(file, self.up, part[:1], self.rows).flatten(1).to(weight)
        down = _read(file, self.down, (), None, self.columns).view(-1, *whole[1:])
        down = down[(slice(None), *part[1:])].flatten(1).to(weight)
        weight += ((strength * self.scale) * (up @ down)).view_as(weight)


@dataclass(frozen=True)
class Difference:
    """A full difference of a parameter. rows, columns: of it that belong to the parameter; None: all."""

    key: str
    scale: float = 1.0
    rows: Rows | None = None
    columns: slice | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def add_to(self, weight: Tensor, file: TensorFile, part: Slices, whole: tuple[int, ...], strength: float):
        weight += (strength * self.scale) * _read(file, self.key, part, self.rows, self.columns).to(weight)


def _read(file: TensorFile, key: str, part: Slices, rows: Rows | None, columns: slice | None = None) -> Tensor:
    """The slices `part` of the tensor that these rows and columns make. part: of the first dims; the others are
    whole."""
    shape = Target(key, rows, columns).shape_in(file.shapes[key])
    part = (*part, *full_slices(shape)[len(part) :])
    pieces = [file.read(key, lies) for _, lies in in_ranges(part, rows, columns)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


Changes = dict[str, LowRank | Difference]  # by diffusers' names of the parameters


@dataclass(frozen=True)
class LoraFile:
    """The changes that a file makes to a network; none if it is for the other expert. Equal if the file is unchanged.

    warning: what is left out and why, or what is unknown; may be empty.
    """

    fingerprint: tuple
    changes: Changes = field(compare=False)
    warning: str = field(default="", compare=False)

    @property
    def path(self) -> Path:
        return Path(self.fingerprint[0])


def fingerprint(path: str) -> tuple:
    """A value that changes with the file, or PEFT's configuration next to it. Raises ValueError if there is no file."""
    if not Path(path).is_file():
        raise ValueError(
            f"There is no LoRA {path}. Give the path of a .safetensors file; ComfyUI's LoRAs belong in models/loras."
        )
    state, config = Path(path).stat(), config_file(Path(path))
    return path, state.st_size, state.st_mtime_ns, config and states((config,))


def read_lora(path: str | Path, shapes: Shapes, names: LoraNames, expert: str | None = None) -> LoraFile:
    """The changes that the file makes to a network whose parameters have these full shapes.

    names: the family's names. expert: which of two experts it is, "high_noise" or "low_noise"; None: there is only one.

    Raises ValueError, which lists the tensors, if no layer of the file fits, or if tensors have an unsupported format
    or an unknown name, are incomplete, not finite, or not floating-point.
    """
    state, path = fingerprint(str(path)), Path(path)
    with open_tensors(path) as file:
        known = shapes | dict.fromkeys(names.fused(shapes), ())
        found = parse_keys(file.shapes, known, names, expert)
        _check_formats(path, found.other_formats)
        for key in file.shapes:
            if not (file.dtype(key).is_floating_point or key.endswith(".alpha")):
                found.faults["that are not floating-point"].append(f"{key} as {file.dtype(key)}")
        changes = _split(_changes(file, found, known), file.shapes, names, found.faults)
        changes, misfits = _fitting(changes, file.shapes, shapes, found.left_out)
        if not found.faults:
            used = dict.fromkeys(key for change in changes.values() for key in change.keys)
            found.faults[NOT_FINITE] += [key for key in used if not is_finite(file.read(key).float())]
        _check_faults(path, found.faults, bool(file.shapes))
        reason = names.made_for(misfits, shapes, found.left_out)
        if not changes and (found.layers or not found.other_expert):
            raise ValueError(
                f"{path} is not a LoRA for this model: none of its {len(file.shapes)} tensors fits. {reason}"
                f"Tensors {list_faults(found.left_out)}. Nothing was changed. Use a LoRA made for this model."
            )
        return LoraFile(state, changes, _warning(path, found, reason, changes))


def _changes(file: TensorFile, found: ParsedKeys, shapes: Shapes) -> Changes:
    """The changes that the keys describe, whether they fit or not."""
    changes: Changes = {}
    config_of = cache(lambda section: adapter_config(file, section))
    for layer, keys in found.layers.items():
        weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
        of_weight = keys.keys() - {"diff_b"}
        scale = 1.0
        if {"up", "down"} <= of_weight <= {"up", "down", "alpha", "up_bias"}:
            scale = _scale(file, layer, keys, config_of, found.faults)
            if math.isfinite(scale) and abs(scale) > MAX_SCALE:
                which = f"{keys.get('alpha', keys['up'])} by {scale:g}"
                found.faults[f"that scale their product by more than {MAX_SCALE:,}"].append(which)
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
    """The changes by the network's parameters, each with its rows and columns of the layer in the file."""
    split: Changes = {}
    for name, change in changes.items():
        shape = _shape_of(change, on_disk)
        targets = targets_of(names.split, name, shape)
        for fault, which in row_faults(targets, shape):
            faults[fault].append(f"{change.keys[0]} {list(on_disk[change.keys[0]])}, {which}")
        for one in targets:
            if one.name in split:
                faults[TWICE].append(f"{split[one.name].keys[0]} and {change.keys[0]} (of {one.name})")
            split[one.name] = replace(change, rows=one.rows, columns=one.columns)
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
        faults["that must be numbers"].append(f"{keys['alpha']} as {dtype}")
        return 1.0
    alpha = file.read(keys["alpha"]).item()
    if not math.isfinite(alpha):
        faults[NOT_FINITE].append(keys["alpha"])
    return alpha / rank


def _fitting(
    changes: Changes, on_disk: Shapes, shapes: Shapes, left_out: Keys
) -> tuple[Changes, dict[str, tuple[int, ...]]]:
    """(the changes that fit, the shapes that the others would change). Adds the keys of the others to `left_out`."""
    fitting, misfits = {}, {}
    for name, change in changes.items():
        whole, own = shapes.get(name), _shape_of(change, on_disk)
        fits = _multiplies_to(change, on_disk, whole) if whole and isinstance(change, LowRank) else own == whole
        if fits:
            fitting[name] = change
            continue
        given = " and ".join(f"{key} {list(on_disk[key])}" for key in change.keys)
        left_out[MISSHAPEN].append(f"{given} for {name} {'which is missing' if whole is None else list(whole)}")
        misfits[name] = own
    return fitting, misfits


def _shape_of(change: LowRank | Difference, on_disk: Shapes) -> tuple[int, ...]:
    """The shape of a parameter that the change fits."""
    first = on_disk[change.keys[0]]
    shape = (*first[:1], *(first if isinstance(change, Difference) else on_disk[change.down])[1:])
    return Target("", change.rows, change.columns).shape_in(shape)


def _multiplies_to(change: LowRank, on_disk: Shapes, whole: tuple[int, ...]) -> bool:
    up, down = on_disk[change.up], on_disk[change.down]
    matrices = min(len(up), len(down), len(whole)) > 1 and down[0] <= MAX_RANK
    rows, *columns = _shape_of(change, on_disk)
    return matrices and (rows, math.prod(columns)) == (whole[0], math.prod(whole[1:]))


def _warning(path: Path, found: ParsedKeys, reason: str, changes: Changes) -> str:
    texts = []
    if found.left_out:
        faults = list_faults(found.left_out)
        texts.append(f"The LoRA {path} is used without some of its tensors: {faults}. {reason}".strip())
    idle = [name for name, change in changes.items() if isinstance(change, LowRank) and change.changes_nothing]
    if idle:
        which = list_faults({"weights, because alpha or the rank is 0": idle})
        texts.append(
            f"The LoRA {path} does not change {which}. Did its training finish? Use the file as its trainer wrote it."
        )
    without = _pairs_without_alpha(found)
    of_peft = path.stem == PEFTS_WEIGHTS or any(key.startswith("base_model.model.") for key in without)
    if of_peft and changes and without and config_file(path) is None:
        texts.append(
            f"The LoRA {path} was written by PEFT, which keeps alpha in {PEFTS_CONFIG}. Without that file it is merged "
            f"with alpha = rank, which may differ from its training. Put {PEFTS_CONFIG} next to it, and name it "
            f"{PEFTS_WEIGHTS}{path.suffix}."
        )
    return " ".join(texts)


def _pairs_without_alpha(found: ParsedKeys) -> list[str]:
    return [keys["up"] for keys in found.layers.values() if "up" in keys and "alpha" not in keys]


def _check_formats(path: Path, formats: Keys) -> None:
    """Raises ValueError if there are tensors of unsupported formats."""
    if formats:
        listed = list_faults({f"of {name}": keys for name, keys in formats.items()})
        raise ValueError(
            f"{path} has an unsupported format. Tensors {listed}. Nothing was changed. Use a LoRA of low-rank pairs, "
            "or merge it into a model with the software that made it."
        )


def _check_faults(path: Path, faults: Keys, has_tensors: bool) -> None:
    """Raises ValueError if there are faults, or the file is empty."""
    listed = list_faults(faults)
    if listed or not has_tensors:
        raise ValueError(
            f"{path} is not a LoRA for this model. {f'Tensors {listed}' if listed else 'It holds no tensors'}. Nothing "
            "was changed. Use a LoRA of this model in the layout of diffusers, kohya or ComfyUI (low-rank pairs with "
            "or without alpha, full differences)."
        )
