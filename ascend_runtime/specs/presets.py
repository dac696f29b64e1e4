"""The accelerators by name, and the values of their presets. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from .acceleration import (
    METHOD_FIELDS, RAINFUSIONS, AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, Preset, RainFusionSpec,
    StepCacheSpec,
)  # fmt: skip

SPECS = {
    "attention_cache": AttentionCacheSpec,
    "block_cache": BlockCacheSpec,
    "step_cache": StepCacheSpec,
    "rainfusion": RainFusionSpec,
}
# The fields of each that a user sets.
FIELDS = {kind: tuple(name for name in spec.__struct_fields__ if name != "preset") for kind, spec in SPECS.items()}
PRESETS = ("quality", "balanced", "fast")
Values = Mapping[str, float]  # of fields, by name
# Step cache -> preset -> the values that a family has in place of those in TABLE.
FamilyPresets = Mapping[str, Mapping[str, Values]]
# Accelerator -> method -> the fields that each preset sets; other fields keep the spec's defaults. First and last steps
# of reuse and of sparse attention are such defaults, fractions of a job's steps, so a preset fits any number of steps.
TABLE = {
    "attention_cache": {"": ({"interval": 2}, {"interval": 4}, {"interval": 6})},
    "block_cache": {
        "": ({"interval": 2, "first_block": 1}, {"interval": 3, "first_block": 1}, {"interval": 4, "first_block": 1})
    },
    "step_cache": {
        "fbcache": (
            {"threshold": 0.05, "first_steps": 4, "last_steps": 2},
            {"threshold": 0.08, "first_steps": 3, "last_steps": 1},
            {"threshold": 0.12, "first_steps": 2, "last_steps": 1},
        ),
        "teacache": ({"threshold": 0.06}, {"threshold": 0.1}, {"threshold": 0.2}),
        "magcache": (
            {"threshold": 0.02, "most": 1},
            {"threshold": 0.04, "most": 2},
            {"threshold": 0.12, "most": 4},
        ),
        "taylorseer": (
            {"interval": 2, "order": 1, "first_steps": 3},
            {"interval": 3, "order": 1, "first_steps": 3},
            {"interval": 4, "order": 1, "first_steps": 3},
        ),
    },
    "rainfusion": {version: ({"sparsity": 0.5}, {"sparsity": 0.64}, {"sparsity": 0.8}) for version in RAINFUSIONS},
}


def chosen(kind: str, preset: str | None = None, **values) -> Struct:
    """The spec of an accelerator from a preset and values that override it. Raises ValueError for unknown names.

    kind: a key of SPECS. preset: one of PRESETS; None uses the spec's defaults. values: fields to replace.
    """
    if kind not in SPECS:
        raise ValueError(f"There is no accelerator {kind!r}; it can be one of {', '.join(SPECS)}.")
    unknown = [name for name in values if name not in FIELDS[kind]]
    if unknown:
        raise ValueError(f"{kind} has no field {unknown[0]}; it has {', '.join(FIELDS[kind])}.")
    spec = SPECS[kind](**values)
    if preset is None:
        return spec
    if preset not in PRESETS:
        raise ValueError(f"preset of {kind} is {preset!r}; it can be one of {', '.join(PRESETS)}.")
    method = getattr(spec, METHOD_FIELDS[kind]) if kind in METHOD_FIELDS else ""
    own = {"preset": Preset(name=preset, given=tuple(values))} if kind == "step_cache" else {}
    return SPECS[kind](**{**TABLE[kind][method][PRESETS.index(preset)], **values, **own})


def for_family(spec: AccelerationSpec, presets: FamilyPresets) -> AccelerationSpec:
    """`spec` with a family's own values of the step cache's preset, where the user gave none."""
    cache = spec.step_cache
    if cache is None or cache.preset is None:
        return spec
    own = presets.get(cache.method, {}).get(cache.preset.name, {})
    return replace(
        spec,
        step_cache=replace(cache, **{name: value for name, value in own.items() if name not in cache.preset.given}),
    )


def describe_family(presets: FamilyPresets) -> str:
    """A family's own values of presets, as text."""
    return "; ".join(
        f"{method}: " + ", ".join(f"{preset} ({_values(values)})" for preset, values in rows.items())
        for method, rows in presets.items()
    )


def describe_presets(kind: str) -> str:
    """The presets as text: one line per preset, or one per method if the methods differ."""
    methods = TABLE[kind]
    first, *others = methods.values()
    if all(rows == first for rows in others):
        return "\n".join(f"{preset}: {_values(row)}." for preset, row in zip(PRESETS, first))
    return "\n".join(
        f"{method}: " + "; ".join(f"{preset} ({_values(row)})" for preset, row in zip(PRESETS, rows)) + "."
        for method, rows in methods.items()
    )


def _values(values: Values) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
