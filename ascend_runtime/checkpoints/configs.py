"""What numbers of a network's config may be, whoever wrote it."""

from __future__ import annotations

import math
from pathlib import Path

from .faults import shown

# What our own code reads of a config, and reckons with.
COUNTS = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
          "ffn_dim", "z_dim", "scale_factor_spatial", "scale_factor_temporal", "rope_max_seq_len")  # fmt: skip
EPSILONS = ("eps", "layer_norm_epsilon")  # added to what a norm divides by
# A network is built before its weights are compared with those on disk, and a config is quick to write: what makes a
# part of it, and what makes a table that is no weight, has a bound. Published ones have a fifth of these, or less.
MOST = {"num_layers": 256, "num_decoder_layers": 256, "num_res_blocks": 16, "num_attention_heads": 512,
        "attention_head_dim": 1024, "rope_max_seq_len": 2**14, "num_heads": 512, "z_dim": 1024, "patch_size": 16,
        "scale_factor_spatial": 128, "scale_factor_temporal": 64}  # fmt: skip
MOST_OF_ANY = 2**20  # any whole number, such as a layer's width or the size of a vocabulary
LONGEST_LIST = {"latents_mean": 1024, "latents_std": 1024}
LONGEST_LIST_OF_ANY = 16  # of the numbers of a list, such as those of blocks


def check_counts(config: dict, file: Path) -> None:
    """Raises ValueError for a config, the JSON of `file`, where a number is none, or not above 0, or larger than any
    network has it, or a list is longer."""
    wrong = [f"{name} {shown(repr(config[name]))}" for name in COUNTS
             if name in config and not (type(config[name]) is int and config[name] > 0)]  # fmt: skip
    patch = config.get("patch_size")
    if not all(type(one) is int and one > 0 for one in (patch if isinstance(patch, (list, tuple)) else [patch or 1])):
        wrong.append(f"patch_size {shown(repr(patch))}")
    if wrong:
        raise ValueError(f"{file} says {', '.join(wrong)}. That must be whole numbers above 0. Download it again.")
    wrong = [f"{name} {shown(repr(config[name]))}" for name in EPSILONS
             if name in config and not (is_finite(config[name]) and config[name] > 0)]  # fmt: skip
    if wrong:
        raise ValueError(f"{file} says {', '.join(wrong)}. That must be numbers above 0. Download it again.")
    large = [f"{name} {shown(repr(value))} (at most {most})" for name, value in config.items() if _is_name(name)
             for most in [MOST.get(name, MOST_OF_ANY)] if _largest(value) > most]  # fmt: skip
    long = [f"{name} of {len(value)} (at most {most})" for name, value in config.items()
            if _is_name(name) and isinstance(value, (list, tuple))
            for most in [LONGEST_LIST.get(name, LONGEST_LIST_OF_ANY)] if len(value) > most]  # fmt: skip
    if large or long:
        raise ValueError(f"{file} says {', '.join((large + long)[:4])}, more than any network has. Download it again.")


def is_finite(number: object) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _is_name(name: str) -> bool:
    """Whether it may be a network's parameter, and no note of who wrote the file."""
    return name.isidentifier() and not name.startswith("_")


def _largest(value: object) -> int:
    """The largest of one or several whole numbers, without their sign."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((abs(one) for one in values if isinstance(one, int)), default=0)
