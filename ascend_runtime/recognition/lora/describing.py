"""Describes a LoRA's file without a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...checkpoints.formats.tensor_file import TensorFile
from ...checkpoints.opening import open_tensors
from .changes import WeightChange
from .forms import change_of, form_of
from .keys import OTHER_FORMATS, experts_of, is_for_text, module_and_role, other_format
from .scale import IN_FOLDERS, IN_THE_HEADER, PEFTS_CONFIG, config_file, weights_file

PRODUCTS = {"down", "hada_w1_a", "lokr_w1", "lokr_w1_a"}  # roles of which one makes a file a LoRA
LISTED_RANKS = 4  # matrix ranks that a line lists

KeysOfLayers = dict[tuple[str | None, str], dict[str, str]]  # by expert and name: the keys by their roles


@dataclass(frozen=True)
class Described:
    """lines: about the file. usable: whether there is nothing in it for which it is refused, whatever the model."""

    lines: list[str]
    usable: bool


def describe(path: Path) -> Described | None:
    """The forms, ranks, alpha and experts of the LoRA in a file or in PEFT's folder. None: it is no LoRA.

    Raises ValueError for a file that cannot be read. Reads no tensor.
    """
    if path.is_dir() and not any((path / name).is_file() for name in IN_FOLDERS):
        return None
    with open_tensors(weights_file(path)) as file:
        layers, for_text, refused = _layers(file.shapes)
        is_lora = any(PRODUCTS & roles.keys() for roles in layers.values())
        if not (is_lora or refused.keys() & OTHER_FORMATS.keys()):
            return None
        lines = [*_lines(file, layers)] if is_lora else ["LoRA"]
        lines += [f"left out: {for_text} tensors for text encoders"] if for_text else []
        lines += [f"refused: {count} tensors of {what}" for what, count in refused.items()]
        return Described(lines, not refused)


@lru_cache(maxsize=256)
def forms_in(path: str, state: Hashable) -> str:
    """The names of the forms in a file, of which this is the state; the file is opened once for each."""
    with open_tensors(Path(path)) as file:
        return ", ".join(form for form, _ in _counted(_layers(file.shapes)[0]).most_common())


def _layers(keys: Iterable[str]) -> tuple[KeysOfLayers, int, Counter[str]]:
    """(the keys of each layer by role, the number of keys for text encoders, those of formats that are refused)"""
    layers, for_text, refused = defaultdict(dict), 0, Counter()
    for key, expert in experts_of(keys).items():
        name, role = module_and_role(key)
        if is_for_text(key):
            for_text += 1
        elif (kind := other_format(key)) or role is None:
            refused[kind or "an unknown kind"] += 1
        else:
            layers[expert, name]["diff" if role == "diff_m" else role] = key
    return layers, for_text, refused


def _changes(layers: KeysOfLayers) -> Iterator[tuple[WeightChange | None, dict[str, str]]]:
    """(the change of a layer's weight, None if there is none or it is incomplete; the layer's keys)"""
    for roles in layers.values():
        yield change_of({role: key for role, key in roles.items() if role != "diff_b"}), roles


def _counted(layers: KeysOfLayers) -> Counter[str]:
    """The number of layers of each form."""
    forms = Counter()
    for change, roles in _changes(layers):
        if change is not None:
            forms[form_of(change)] += 1
        elif "diff_b" not in roles:
            forms["incomplete"] += 1
    return forms


def _lines(file: TensorFile, layers: KeysOfLayers) -> Iterator[str]:
    forms, ranks, with_alpha = _counted(layers), Counter(), 0
    for change, roles in _changes(layers):
        if change is not None and change.rank_key is not None:
            ranks[file.shapes[change.rank_key][0]] += 1
            with_alpha += "alpha" in roles
    counted = (f"{form} ({count} layer{'s' * (count != 1)})" for form, count in forms.most_common())
    yield f"LoRA: {', '.join(counted)}"
    if ranks:
        listed = ", ".join(str(rank) for rank, _ in ranks.most_common(LISTED_RANKS))
        yield f"rank: {listed}{', ...' * (len(ranks) > LISTED_RANKS)}; alpha: {_alpha(file, with_alpha)}"
    experts = {expert for expert, _ in layers}
    yield f"for: {' and '.join(sorted(filter(None, experts))) or 'both experts, or the only one'}"


def _alpha(file: TensorFile, with_alpha: int) -> str:
    if with_alpha:
        return "in its tensors"
    if IN_THE_HEADER in file.header:
        return f"in its header ({IN_THE_HEADER})"
    return f"in {PEFTS_CONFIG}" if config_file(file.path) else "none, so it is taken as the rank"
