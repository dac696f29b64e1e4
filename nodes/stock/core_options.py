"""What core's own loaders offer, so that ours accept every value of a stock graph, and refuse by name what they cannot
do; and how ComfyUI was started."""

from __future__ import annotations

import nodes as core  # ComfyUI's own module
from comfy.cli_args import args


def options_of(loader: str, widget: str) -> list[str]:
    """The options of a widget of one of core's loaders."""
    kind, *more = core.NODE_CLASS_MAPPINGS[loader].INPUT_TYPES()["required"][widget]
    return list(kind if isinstance(kind, (list, tuple)) else more[0]["options"])


def with_further(listed: list[str], further: list[str]) -> list[str]:
    """The first list, and what only the second one has."""
    return [*listed, *(name for name in further if name not in listed)]


def dtype_for(part: str) -> str:
    """The dtype that ComfyUI was started with for "vae" or "text_enc"."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return next((dtype for dtype, flag in short.items() if getattr(args, f"{flag}_{part}", False)), "auto")
