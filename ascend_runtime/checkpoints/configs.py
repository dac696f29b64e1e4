"""Checks the numbers in a network's config, whichever system wrote it."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import coded_error
from .faults import shown

# The fields that our own code reads and computes with.
COUNTS = ("num_layers", "num_single_layers", "num_refiner_layers", "num_attention_heads", "attention_head_dim",
          "in_channels", "out_channels", "text_dim", "text_embed_dim", "pooled_projection_dim", "ffn_dim", "z_dim",
          "latent_channels", "scale_factor_spatial", "scale_factor_temporal", "rope_max_seq_len", "patch_size_t",
          "layers_per_block", "in_dim_ref_conv", "spatial_compression_ratio", "temporal_compression_ratio")  # fmt: skip
EPSILONS = ("eps", "layer_norm_epsilon")  # added to the divisor of a norm
# A network is built before its shapes are compared with those on disk, so the fields that determine the number of its
# modules and the size of tables without weights are bounded. Published configs have at most a fifth of these values.
MAX_VALUES = {"num_layers": 256, "num_decoder_layers": 256, "num_single_layers": 256, "num_refiner_layers": 256,
        "num_hidden_layers": 256, "num_res_blocks": 16, "layers_per_block": 16, "num_attention_heads": 512,
        "attention_head_dim": 1024, "rope_max_seq_len": 2**14, "num_heads": 512, "z_dim": 1024, "latent_channels": 1024,
        "patch_size": 16, "patch_size_t": 16, "scale_factor_spatial": 128, "scale_factor_temporal": 64,
        "spatial_compression_ratio": 128, "temporal_compression_ratio": 64}  # fmt: skip
MAX_VALUE = 2**20  # of any other integer, such as a layer's width or the size of a vocabulary
MAX_LIST_LENGTHS = {"latents_mean": 1024, "latents_std": 1024}
MAX_LIST_LENGTH = 16  # of any other list, such as numbers of blocks


def check_counts(config: dict, file: Path) -> None:
    """Raises ValueError if a number in a config, read from `file`, is invalid, not above 0, or larger than in any
    network, or if a list is too long."""
    wrong = [f"{name} {shown(repr(config[name]))}" for name in COUNTS
             if name in config and not (type(config[name]) is int and config[name] > 0)]  # fmt: skip
    patch = config.get("patch_size")
    if not all(type(one) is int and one > 0 for one in (patch if isinstance(patch, (list, tuple)) else [patch or 1])):
        wrong.append(f"patch_size {shown(repr(patch))}")
    if wrong:
        raise coded_error(
            "AV-1309", f"{file} says {', '.join(wrong)}. These must be integers above 0. Download it again."
        )
    wrong = [f"{name} {shown(repr(config[name]))}" for name in EPSILONS
             if name in config and not (is_finite_number(config[name]) and config[name] > 0)]  # fmt: skip
    if wrong:
        raise coded_error(
            "AV-1309", f"{file} says {', '.join(wrong)}. These must be numbers above 0. Download it again."
        )
    large = [f"{name} {shown(repr(value))} (at most {most})" for name, value in config.items() if _is_name(name)
             for most in [MAX_VALUES.get(name, MAX_VALUE)] if _largest(value) > most]  # fmt: skip
    long = [f"{name} with {len(value)} entries (at most {most})" for name, value in config.items()
            if _is_name(name) and isinstance(value, (list, tuple))
            for most in [MAX_LIST_LENGTHS.get(name, MAX_LIST_LENGTH)] if len(value) > most]  # fmt: skip
    if large or long:
        raise coded_error(
            "AV-1309", f"{file} says {', '.join((large + long)[:4])}, more than any network has. Download it again."
        )


def is_finite_number(number: object) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _is_name(name: str) -> bool:
    """Whether `name` can be a network's parameter, and is not metadata of the file's writer."""
    return name.isidentifier() and not name.startswith("_")


def _largest(value: object) -> int:
    """The largest magnitude of one or several integers."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((abs(one) for one in values if isinstance(one, int)), default=0)
