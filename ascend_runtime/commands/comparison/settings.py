"""Parses the settings to compare from the command line.

    attention_cache=fast                                          a preset
    attention_cache:ratio=1.3                                     values
    step_cache=balanced:method=taylorseer                         a preset with other values
    step_cache:threshold=0.05+rainfusion:sparsity=0.5             two accelerators together
    rainfusion:sparsity=0.5/0.64/0.8                              three settings
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import fields

from ...specs import AccelerationSpec, ParallelSpec
from ...specs.presets import SPECS, chosen

PART = re.compile(r"(?P<kind>\w+)(?:=(?P<preset>\w+))?(?::(?P<values>.+))?", re.DOTALL)
EXAMPLES = "attention_cache=fast, step_cache:method=fbcache,threshold=0.05 or step_cache=fast+rainfusion:sparsity=0.5"


@dataclass(frozen=True)
class Setting:
    """name: as on the command line, but with only this setting's values of a sweep."""

    name: str
    spec: AccelerationSpec


def settings_of(text: str) -> list[Setting]:
    """Parses a text into one setting, or the settings of a sweep. Raises ValueError that quotes the text."""
    try:
        choices = [_choices(part.strip()) for part in text.split("+")]
        return [_setting(parts) for parts in itertools.product(*choices)]
    except ValueError as error:
        raise ValueError(f"--setting {text}: {error}") from None


def value_of(owner: type, name: str, text: str) -> Any:
    """Parses the value of a field. Raises ValueError."""
    types = {field.name: field.type for field in fields(owner) if field.name != "preset"}  # which has its own place
    if name not in types:
        raise ValueError(f"There is no field {name}; the fields are {', '.join(types)}.")
    try:
        return msgspec.convert(text, types[name], strict=False)
    except msgspec.ValidationError:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        kind = next((words for kind, words in kinds.items() if kind in str(types[name])), "a word")
        raise ValueError(f"{name} is {text!r}; give {kind}.") from None


def pairs_of(text: str) -> list[tuple[str, str]]:
    """Parses name=value,name=value. Raises ValueError."""
    pairs = [pair.strip().partition("=") for pair in text.split(",")]
    wrong = [name for name, equals, value in pairs if not (name and equals and value)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not of the form name=value. Examples: {EXAMPLES}.")
    return [(name, value) for name, _, value in pairs]


def parallel_of(text: str | None, ranks: int) -> ParallelSpec:
    """Parses a plan for `ranks` ranks, such as ulysses_degree=4,cfg_degree=2. Raises ValueError."""
    given = {name: value_of(ParallelSpec, name, value) for name, value in pairs_of(text)} if text else {}
    return ParallelSpec(**{"ranks": ranks, **given})


def _choices(part: str) -> list[tuple[str, str | None, tuple[tuple[str, str], ...]]]:
    """(accelerator, preset, values as text) for each combination of a sweep."""
    match = PART.fullmatch(part)
    if match is None:
        raise ValueError(f"{part!r} is not a valid setting. Examples: {EXAMPLES}.")
    pairs = pairs_of(match["values"]) if match["values"] else []
    swept = [[(name, value) for value in values.split("/")] for name, values in pairs]
    return [(match["kind"], match["preset"], values) for values in itertools.product(*swept)]


def _setting(parts: tuple) -> Setting:
    spec, names = AccelerationSpec(), []
    for kind, preset, pairs in parts:
        given = {name: value_of(SPECS[kind], name, text) for name, text in pairs} if kind in SPECS else {}
        spec = spec.with_accelerator(kind, chosen(kind, preset, **given))
        written = ",".join(f"{name}={text}" for name, text in pairs)
        names.append(kind + (f"={preset}" if preset else "") + (f":{written}" if written else ""))
    return Setting("+".join(names), spec)
