"""Maps the parameter names of all systems that write HunyuanVideo checkpoints to those of diffusers and transformers,
with a single block's `proj_out` in two: its columns for the attention, and those for the feed-forward."""

from __future__ import annotations

import re

from ....checkpoints.fused import Target, layers_of_joined_inputs
from ....checkpoints.renaming import PREFIXES, renamed

PARTS_OF_PROJ_OUT = {"attn": 1, "mlp": 4}  # the ratios of their inputs
PROJ_OUT = re.compile(r"^(single_transformer_blocks\.\d+\.proj_out)\.(\w+)$")
PART_OF_PROJ_OUT = re.compile(r"^(single_transformer_blocks\.\d+\.proj_out)_(attn|mlp)\.")


def to_diffusers_name(name: str) -> str | None:
    return renamed(name, PREFIXES)


def split_transformer(name: str, shape: tuple[int, ...]) -> tuple[Target, ...] | None:
    """The parameters in a tensor of this name (after `to_diffusers_name`) and shape."""
    if found := PROJ_OUT.match(name):
        layers = {f"{found[1]}_{part}": ratio for part, ratio in PARTS_OF_PROJ_OUT.items()}
        return layers_of_joined_inputs(layers, found[2], shape)
    return None


def published_name(name: str) -> str:
    """diffusers' name of the tensor that holds a transformer's parameter."""
    return PART_OF_PROJ_OUT.sub(r"\1.", name)


def same(name: str) -> str | None:
    return name
