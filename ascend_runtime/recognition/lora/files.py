"""Reads LoRA files: which parameter each of their tensors changes, and how.

A change of a weight W makes it W + strength * alpha / rank * (its product; see changes.py), or what DoRA makes of both
(dependent.py). The bias of B changes the layer's bias, with the scale of the product. alpha is in the file, or in the
metadata that diffusers and PEFT write with it (scale.py); without it alpha / rank is 1, as in core ComfyUI.

Layers that this model lacks, or that have another size here, are left out with a warning, as in core ComfyUI. A file
that does not fit at all is rejected, and so is a file with tensors that may change the result in an unknown way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from ...checkpoints.faults import list_faults
from ...checkpoints.formats.tensor_file import TensorFile
from ...checkpoints.fused import row_faults, targets_of
from ...checkpoints.opening import open_tensors
from ...checkpoints.states import states
from ...errors import coded_error
from ...models.family import LoraNames
from ...models.shapes import Shapes
from ...ops.finite import is_finite
from .changes import Difference, WeightChange
from .forms import change_of
from .keys import MAGNITUDES, TWICE, Keys, ParsedKeys, module_and_role, parse_keys, section
from .scale import IN_THE_HEADER, PEFTS_CONFIG, PEFTS_WEIGHTS, AdapterConfig, adapter_config, config_file, weights_file

MISSHAPEN = "of the wrong shape"
INCOMPLETE = "that make no complete change"
NOT_FINITE = "with NaN or infinite values"
WITHOUT_MAGNITUDE = "without the magnitude of DoRA (lora_magnitude_vector), although their configuration sets use_dora"
MINDSPEEDS = re.compile(r"_attn\.proj_(q|k|v|out)\.lora_[AB]")
MAX_SCALE = 10_000  # alpha / rank; at most 16 in published LoRAs


Changes = dict[str, WeightChange]  # by diffusers' names of the parameters


@dataclass(frozen=True)
class LoraFile:
    """The changes that a file makes to a network; none if it is for the other expert. Equal if the file is unchanged.

    warning: what is left out and why, or what is unknown; may be empty. misfits: as `read_lora` was asked.
    """

    fingerprint: tuple
    changes: Changes = field(compare=False)
    warning: str = field(default="", compare=False)
    misfits: str = "refuse"

    @property
    def path(self) -> Path:
        return Path(self.fingerprint[0])


def fingerprint(path: str) -> tuple:
    """A value that changes with the file, or PEFT's configuration next to it. Raises ValueError if there is no file."""
    file = weights_file(Path(path))
    state, config = file.stat(), config_file(file)
    return str(file), state.st_size, state.st_mtime_ns, config and states((config,))


def read_lora(
    path: str | Path, shapes: Shapes, names: LoraNames, expert: str | None = None, misfits: str = "refuse"
) -> LoraFile:
    """The changes that the file, or the file in PEFT's folder, makes to a network whose parameters have these full
    shapes.

    names: the family's names. expert: which of two experts it is, "high_noise" or "low_noise"; None: there is only one.
    misfits: what to do about a file of which nothing fits, and about tensors whose shapes contradict each other:
        "refuse", or "skip", which leaves them out with a warning.

    Raises ValueError, which lists the tensors, if no layer of the file fits, or if tensors have an unsupported format
    or an unknown name, are incomplete, not finite, or not floating-point.
    """
    state = fingerprint(str(path))
    path = Path(state[0])
    with open_tensors(path) as file:
        known = shapes | dict.fromkeys(names.fused(shapes), ())
        found = parse_keys(file.shapes, known, names, expert)
        _check_formats(path, found.other_formats)
        for key in file.shapes:
            if not (file.dtype(key).is_floating_point or key.endswith(".alpha")):
                found.faults["that are not floating-point"].append(f"{key} as {file.dtype(key)}")
        unfit = found.left_out if misfits == "skip" else found.faults
        changes = _split(_changes(file, found, known, unfit), file.shapes, names, found.faults, unfit)
        changes, others = _fitting(changes, file.shapes, shapes, found.left_out)
        if not found.faults:
            used = dict.fromkeys(key for change in changes.values() for key in change.keys)
            found.faults[NOT_FINITE] += [key for key in used if not is_finite(file.read(key).float())]
        _check_faults(path, found.faults, bool(file.shapes))
        reason = names.made_for(others, shapes, found.left_out)
        if not changes and misfits == "refuse" and (found.layers or not found.other_expert):
            raise coded_error(
                "AV-1404",
                f"{path} is not a LoRA for this model: none of its {len(file.shapes)} tensors fits. {reason}"
                f"Tensors {list_faults(found.left_out)}. Nothing was changed. Use a LoRA made for this model.",
            )
        knows_alpha = IN_THE_HEADER in file.header or config_file(path) is not None
        without_alpha = [] if knows_alpha else _products_without_alpha(found)
        return LoraFile(state, changes, _warning(path, found, reason, changes, without_alpha), misfits)


def _changes(file: TensorFile, found: ParsedKeys, shapes: Shapes, unfit: Keys) -> Changes:
    """The changes that the keys describe, whether they fit the model or not. unfit: gets tensors of a change that do
    not fit together."""
    changes: Changes = {}
    config_of = cache(lambda section: adapter_config(file, section))
    for layer, keys in found.layers.items():
        weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
        of_weight = {role: key for role, key in keys.items() if role != "diff_b"}
        scale, change = 1.0, change_of(of_weight)
        if change is not None and change.layer(file.shapes) is None:
            unfit[INCOMPLETE].append(" and ".join(f"{key} {list(file.shapes[key])}" for key in change.keys))
        elif change is not None:
            if change.rank_key is not None:
                rank = file.shapes[change.rank_key][0]
                scale = _scale(file, layer, keys, rank, config_of, found.faults) if rank else 0.0
            if math.isfinite(scale) and abs(scale) > MAX_SCALE:
                which = f"{keys.get('alpha', change.keys[0])} by {scale:g}"
                found.faults[f"that scale their product by more than {MAX_SCALE:,}"].append(which)
            changes[weight] = replace(change, scale=scale)
        elif of_weight:
            found.faults[INCOMPLETE].append(f"{' and '.join(of_weight.values())} (of {weight})")
        if "up_bias" in keys:
            changes[f"{layer}.bias"] = Difference(keys["up_bias"], scale)
        if "diff_b" in keys and "up_bias" in keys:
            found.faults[TWICE].append(f"{keys['up_bias']} and {keys['diff_b']}")
        elif "diff_b" in keys:
            changes[f"{layer}.bias"] = Difference(keys["diff_b"])
    return changes


def _split(changes: Changes, on_disk: Shapes, names: LoraNames, faults: Keys, unfit: Keys) -> Changes:
    """The changes by the network's parameters, each with its rows and columns of the layer in the file. unfit: gets
    layers with rows or columns of no parameter, which are left out."""
    split: Changes = {}
    for name, change in changes.items():
        shape = change.shape(on_disk)
        targets = targets_of(names.split, name, shape)
        misfits = [*row_faults(targets, shape)]
        for fault, which in misfits:
            unfit[fault].append(f"{change.keys[0]} {list(on_disk[change.keys[0]])}, {which}")
        for one in () if misfits else targets:
            if one.name in split:
                faults[TWICE].append(f"{split[one.name].keys[0]} and {change.keys[0]} (of {one.name})")
            parts = {"parts": targets} if change.depends else {}
            split[one.name] = replace(change, rows=one.rows, columns=one.columns, **parts)
    return split


def _scale(
    file: TensorFile,
    layer: str,
    keys: dict[str, str],
    rank: int,
    config_of: Callable[[str], AdapterConfig | None],
    faults: Keys,
) -> float:
    """alpha / rank of a product."""
    if "alpha" not in keys:
        first = [*keys.values()][0]
        config = config_of(section(first))
        if config is None:
            if MINDSPEEDS.search(first):
                raise coded_error(
                    "AV-1405",
                    f"{file.path} is a LoRA of MindSpeed-MM, which does not write alpha into it. Name the file "
                    f"{PEFTS_WEIGHTS}{file.path.suffix}, and write {PEFTS_CONFIG} next to it, with r and lora_alpha of "
                    'the training: {"r": 8, "lora_alpha": 16}.',
                )
            return 1.0
        if config.dora and not keys.keys() & MAGNITUDES.keys():
            faults[WITHOUT_MAGNITUDE].append(first)
        return config.scale((module_and_role(first)[0], layer), rank)
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
        whole, own = shapes.get(name), change.shape(on_disk)
        if whole is not None and change.fits(on_disk, whole):
            fitting[name] = change
            continue
        given = " and ".join(f"{key} {list(on_disk[key])}" for key in change.keys)
        left_out[MISSHAPEN].append(f"{given} for {name} {'which is missing' if whole is None else list(whole)}")
        misfits[name] = own
    return fitting, misfits


def _warning(path: Path, found: ParsedKeys, reason: str, changes: Changes, without_alpha: list[str]) -> str:
    """without_alpha: a key of each product whose alpha is not known."""
    texts = []
    if found.left_out:
        faults = list_faults(found.left_out)
        without = "is used without some of its tensors" if changes else "changes nothing, as none of its tensors fits"
        texts.append(f"The LoRA {path} {without}: {faults}. {reason}".strip())
    idle = [name for name, change in changes.items() if change.changes_nothing]
    if idle:
        which = list_faults({"weights, because alpha or the rank is 0": idle})
        texts.append(
            f"The LoRA {path} does not change {which}. Did its training finish? Use the file as its trainer wrote it."
        )
    of_peft = path.stem == PEFTS_WEIGHTS or any(key.startswith("base_model.model.") for key in without_alpha)
    if of_peft and changes and without_alpha:
        texts.append(
            f"The LoRA {path} was written by PEFT, which keeps alpha in {PEFTS_CONFIG}. Without that file it is merged "
            f"with alpha = rank, which may differ from its training. Put {PEFTS_CONFIG} next to it, and name it "
            f"{PEFTS_WEIGHTS}{path.suffix}."
        )
    return " ".join(texts)


def _products_without_alpha(found: ParsedKeys) -> list[str]:
    firsts = [keys.get("up") or keys.get("hada_w1_a") for keys in found.layers.values() if "alpha" not in keys]
    return [key for key in firsts if key is not None]


def _check_formats(path: Path, formats: Keys) -> None:
    """Raises ValueError if there are tensors of unsupported formats."""
    if formats:
        listed = list_faults({f"of {name}": keys for name, keys in formats.items()})
        raise coded_error(
            "AV-1405",
            f"{path} has an unsupported format. Tensors {listed}. Nothing was changed. Use a LoRA of low-rank pairs, "
            "LoHa or LoKr, or merge it into a model with the software that made it.",
        )


def _check_faults(path: Path, faults: Keys, has_tensors: bool) -> None:
    """Raises ValueError if there are faults, or the file is empty."""
    listed = list_faults(faults)
    if listed or not has_tensors:
        raise coded_error(
            "AV-1404",
            f"{path} is not a LoRA for this model. {f'Tensors {listed}' if listed else 'It holds no tensors'}. Nothing "
            "was changed. Use a LoRA of this model in the layout of diffusers, kohya or ComfyUI (low-rank pairs, "
            "LoHa or LoKr with or without alpha, full differences).",
        )
