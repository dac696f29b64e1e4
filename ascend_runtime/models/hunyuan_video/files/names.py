"""Maps the parameter names of all systems that write HunyuanVideo checkpoints to those of diffusers and transformers,
with a single block's `proj_out` in two: its columns for the attention, and those for the feed-forward."""

from __future__ import annotations

from ....checkpoints.renaming import PREFIXES, renamed


def to_diffusers_name(name: str) -> str | None:
    return renamed(name, PREFIXES)


def same(name: str) -> str | None:
    return name
