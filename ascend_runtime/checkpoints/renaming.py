"""Renames tensors: rules that turn one system's parameter names into another's, and back."""

from __future__ import annotations

import itertools
import re
from functools import cache, lru_cache

Rules = tuple[tuple[str, str], ...]  # patterns and replacements, in order: a later one sees what the earlier ones made

TOKENIZER_MODEL = "spiece_model"  # ComfyUI's text encoders bring their tokenizer along, as the bytes of a tensor
GROUP = re.compile(r"\([^)]*\)")
# What frameworks put before all names of a network.
PREFIXES: Rules = (
    (r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", ""),  # what torch wraps modules in
    (r"^(model\.diffusion_model|module|predictor)\.", ""),
)
# What msModelSlim puts before the last part of a name, where it moved outliers from activations into weights.
MODELSLIM: Rules = ((r"\.(linear|div)(?=\.[^.]+$)", ""),)


@lru_cache(maxsize=50_000)
def renamed(name: str, rules: Rules) -> str:
    """Kept, as a file's names are asked for again and again."""
    for pattern, replacement in _compiled(rules):
        name = pattern.sub(replacement, name)
    return name


@cache
def _compiled(rules: Rules) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def inverted(rules: Rules) -> Rules:
    """Rules that undo these, whose patterns are plain characters, groups and anchors alone."""
    return tuple(_inverse(*rule) for rule in reversed(rules))


def _inverse(pattern: str, replacement: str) -> tuple[str, str]:
    groups = GROUP.findall(pattern)
    start, end = "^" * pattern.startswith("^"), "$" * pattern.endswith("$")
    made = re.sub(r"\\(\d)", lambda number: groups[int(number[1]) - 1], replacement.replace(".", r"\."))
    numbers = itertools.count(1)
    back = GROUP.sub(lambda _: rf"\{next(numbers)}", pattern).strip("^$").replace(r"\.", ".")
    return f"{start}{made}{end}", back


def is_tokenizer(key: str) -> bool:
    """Whether a tensor is the tokenizer that a text encoder's file brings along."""
    return key.rpartition(".")[2] == TOKENIZER_MODEL
