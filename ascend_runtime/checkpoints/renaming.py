"""Renames tensors by rules that map one system's parameter names to another's, and back."""

from __future__ import annotations

import itertools
import re
from functools import cache, lru_cache

Rules = tuple[tuple[str, str], ...]  # patterns and replacements, applied one after the other

TOKENIZER_MODEL = "spiece_model"  # the tokenizer in a file of ComfyUI's text encoders, as a tensor of bytes
GROUP = re.compile(r"\([^)]*\)")
# Prefixes that frameworks add to all names of a network.
PREFIXES: Rules = (
    (r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", ""),  # what torch wraps modules in
    (r"^(model\.diffusion_model|module|predictor)\.", ""),
)
# What msModelSlim inserts before the last part of a name if it moved outliers from activations into weights.
MODELSLIM: Rules = ((r"\.(linear|div)(?=\.[^.]+$)", ""),)


@lru_cache(maxsize=50_000)
def renamed(name: str, rules: Rules) -> str:
    """`name` after these rules. Cached, because the names of a file are needed many times."""
    for pattern, replacement in _compiled(rules):
        name = pattern.sub(replacement, name)
    return name


@cache
def _compiled(rules: Rules) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def inverted(rules: Rules) -> Rules:
    """The inverse of these rules, whose patterns may only have plain characters, groups and anchors."""
    return tuple(_inverse(*rule) for rule in reversed(rules))


def _inverse(pattern: str, replacement: str) -> tuple[str, str]:
    groups = GROUP.findall(pattern)
    start, end = "^" * pattern.startswith("^"), "$" * pattern.endswith("$")
    made = re.sub(r"\\(\d)", lambda number: groups[int(number[1]) - 1], replacement.replace(".", r"\."))
    numbers = itertools.count(1)
    back = GROUP.sub(lambda _: rf"\{next(numbers)}", pattern).strip("^$").replace(r"\.", ".")
    return f"{start}{made}{end}", back


def is_tokenizer(key: str) -> bool:
    """Whether a tensor is the tokenizer in a text encoder's file."""
    return key.rpartition(".")[2] == TOKENIZER_MODEL
