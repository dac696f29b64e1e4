"""Accelerators by name, and the values of their presets: one table, without torch."""

from __future__ import annotations

from msgspec import Struct

from .acceleration import RAINFUSIONS, WAYS, AttentionCacheSpec, BlockCacheSpec, RainFusionSpec, StepCacheSpec

SPECS = {
    "attention_cache": AttentionCacheSpec,
    "block_cache": BlockCacheSpec,
    "step_cache": StepCacheSpec,
    "rainfusion": RainFusionSpec,
}
PRESETS = ("quality", "balanced", "fast")
# By accelerator and method: the fields that each preset sets; the others keep the description's defaults. Which steps
# reuse attention, or are sparse, is such a default, a share of the job's steps, so a preset fits any number of steps.
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
    """The description of an accelerator: a preset with some values replaced. Raises ValueError.

    kind: a name in SPECS. preset: a name in PRESETS; None: the description's defaults. values: fields to replace.
    """
    if kind not in SPECS:
        raise ValueError(f"There is no accelerator {kind!r}; it can be one of {', '.join(SPECS)}.")
    unknown = [name for name in values if name not in SPECS[kind].__struct_fields__]
    if unknown:
        fields = ", ".join(SPECS[kind].__struct_fields__)
        raise ValueError(f"{kind} has no {unknown[0]}; what can be set is {fields}.")
    spec = SPECS[kind](**values)
    if preset is None:
        return spec
    if preset not in PRESETS:
        raise ValueError(f"preset of {kind} is {preset!r}; it can be one of {', '.join(PRESETS)}.")
    method = getattr(spec, WAYS[kind]) if kind in WAYS else ""
    return SPECS[kind](**{**TABLE[kind][method][PRESETS.index(preset)], **values})


def listed(kind: str) -> str:
    """The values of the presets in words: a line for each preset, or for each method if these differ."""
    methods = TABLE[kind]
    first, *others = methods.values()
    if all(rows == first for rows in others):
        return "\n".join(f"{preset}: {_values(row)}." for preset, row in zip(PRESETS, first))
    return "\n".join(
        f"{method}: " + "; ".join(f"{preset} ({_values(row)})" for preset, row in zip(PRESETS, rows)) + "."
        for method, rows in methods.items()
    )


def _values(values: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
