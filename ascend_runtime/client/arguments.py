"""What a caller gives to the runtime, checked before it costs a rank anything. Each raises ValueError."""

from __future__ import annotations

from typing import Any

import torch
from msgspec.structs import asdict
from torch import Tensor

from ..wire.messages import Conditioning

VIDEO, FRAMES = "[B,C,T,H,W]", "[T,H,W,3]"  # what only a model knows of a shape, the ranks check
MAX_PROMPT_CHARACTERS = 50_000  # 512 tokens are read, mostly of 1 to 8 characters; these take a second to be cut up


def check_kind(name: str, value: Any, *kinds: type, optional: bool = False) -> None:
    """It is of one of these types, or, if it is optional, None."""
    if not isinstance(value, kinds) and not (optional and value is None):
        wanted = " or ".join([*(kind.__name__ for kind in kinds), *(["None"] if optional else [])])
        raise ValueError(f"{name} is {_shown(value)}; it must be a {wanted}.")


def check_prompt(text: Any) -> None:
    """One text, of whole characters, that is not too long to be cut into tokens."""
    if not isinstance(text, str):
        hint = " Encode several prompts one after the other." if isinstance(text, (list, tuple)) else ""
        raise ValueError(f"The prompt is {_shown(text)}; it must be one str.{hint}")
    check_whole("The prompt", text)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"The prompt has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are taken, and of these the "
            "first 512 tokens are read. Shorten it."
        )


def check_whole(name: str, text: str) -> None:
    """The text has no half of a character, which no encoding knows: JSON has them where an emoji was cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, place = text[error.start], error.start
        raise ValueError(
            f"{name} holds half a character ({half!r}, at position {place}), as of an emoji that was cut. Remove it, "
            "or write the whole one."
        ) from None


def check_tensor(name: str, tensor: Any, axes: str | None = None, optional: bool = False) -> None:
    """A tensor of real numbers that lie in memory, with these axes ("[T,H,W,3]"), none of them empty."""
    check_kind(name, tensor, Tensor, optional=optional)
    if tensor is None:
        return
    if axes is not None and (tensor.ndim != axes.count(",") + 1 or not tensor.numel()):
        raise ValueError(f"The {name} has the shape {list(tensor.shape)}; it must be {axes}, all 1 or more.")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has the dtype {tensor.dtype}; it must be a float, such as torch.float32.")
    if tensor.layout != torch.strided or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        raise ValueError(f"{name} is sparse, or has no numbers (device {tensor.device}); give a dense tensor.")


def check_frames(frames: Any) -> None:
    """A video in 0..1, with the channels last."""
    if isinstance(frames, Tensor) and frames.dtype == torch.uint8:
        raise ValueError("frames are torch.uint8; they must be floats in 0..1. Give frames.float() / 255.")
    check_tensor("video", frames, FRAMES)
    if frames.shape[-1] < 3:
        raise ValueError(f"The video has the shape {list(frames.shape)}; it must be {FRAMES}, with the channels last.")


def check_conditioning(name: str, given: Any, optional: bool = False) -> None:
    """An embedding, or what else a network of images sees next to it."""
    check_kind(name, given, Tensor, Conditioning, optional=optional)
    parts = asdict(given) if isinstance(given, Conditioning) else {"text": given}
    for part, tensor in parts.items():
        shown = name if part == "text" else f"{name}'s {part}"
        check_tensor(shown, tensor, optional=part != "text" or given is None)


def _shown(value: Any) -> str:
    """A value in an error: its type, and itself where it is short."""
    text = repr(value) if isinstance(value, (str, int, float, list, tuple, dict, type(None))) else ""
    return text if 0 < len(text) <= 60 else f"of type {type(value).__name__}"
