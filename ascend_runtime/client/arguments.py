"""Checks the arguments of the runtime's methods before a job is sent. Every check raises ValueError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from msgspec.structs import asdict
from torch import Tensor

from ..hardware.devices import DEVICE_KINDS
from ..specs import Cluster, ParallelSpec
from ..wire.messages import MAX_ENTRIES, MAX_ENTRY_NAME, Conditioning

LATENT_AXES, FRAMES_AXES, IMAGE_AXES = "[B,C,T,H,W]", "[T,H,W,3]", "[H,W,3]"  # ranks check what depends on the model
MAX_PROMPT_CHARACTERS = 50_000  # far more than the 512 tokens that any model reads; tokenizing them takes a second
MAX_INTERLEAVE = 512  # core ComfyUI's limit
MAX_TEXT_TOKENS = 4096  # of one text; attention to more takes gigabytes


def check_kind(name: str, value: Any, *kinds: type, optional: bool = False) -> None:
    """`value` must have one of these types, or may be None if it is optional."""
    if not isinstance(value, kinds) and not (optional and value is None):
        wanted = " or ".join([*(kind.__name__ for kind in kinds), *(["None"] if optional else [])])
        raise ValueError(f"{name} is {_shown(value)}; it must be a {wanted}.")


def check_for_cluster(parallel: ParallelSpec, device: Any, environment: Any, cluster: Cluster) -> None:
    """What a `Runtime` with a cluster can be given besides it."""
    cluster.require_all(parallel.ranks)
    if device not in DEVICE_KINDS:
        raise ValueError(f"device is {device!r}; it can be one of {', '.join(DEVICE_KINDS)}.")
    if environment is not None:
        raise ValueError(
            "environment is for ranks that this host starts, and torchrun starts those of a cluster. Leave it out, and "
            "set the variables in the environment of torchrun on each machine."
        )


def check_prompt(text: Any) -> None:
    """The prompt must be one valid str that is not too long to tokenize."""
    if not isinstance(text, str):
        hint = " Encode several prompts in separate calls." if isinstance(text, (list, tuple)) else ""
        raise ValueError(f"The prompt is {_shown(text)}; it must be one str.{hint}")
    check_whole("The prompt", text)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"The prompt has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are accepted, of which "
            "models read a few hundred tokens. Shorten it."
        )


def check_whole(name: str, text: str) -> None:
    """The text must not contain half a character (a lone surrogate), as JSON may if an emoji was cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, place = text[error.start], error.start
        raise ValueError(
            f"{name} contains half a character ({half!r}, at position {place}), such as half an emoji. Remove it, or "
            "write the full character."
        ) from None


def check_tensor(
    name: str, tensor: Any, axes: str | None = None, optional: bool = False, floats: bool = True
) -> None:
    """`tensor` must be a dense tensor, of floating-point numbers if `floats`, with these axes, such as "[T,H,W,3]", and
    no empty axis."""
    check_kind(name, tensor, Tensor, optional=optional)
    if tensor is None:
        return
    if axes is not None and (tensor.ndim != axes.count(",") + 1 or not tensor.numel()):
        raise ValueError(f"The {name} has the shape {list(tensor.shape)}; it must be {axes}, each axis at least 1.")
    if floats and not tensor.is_floating_point():
        raise ValueError(f"{name} has the dtype {tensor.dtype}; it must be a float, such as torch.float32.")
    if tensor.layout != torch.strided or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        raise ValueError(f"{name} is sparse, or has no data (device {tensor.device}); give a dense tensor.")


def check_frames(frames: Any) -> None:
    """`frames` must be a video of floats in 0..1, with the channels last."""
    if isinstance(frames, Tensor) and frames.dtype == torch.uint8:
        raise ValueError("frames are torch.uint8; they must be floats in 0..1. Give frames.float() / 255.")
    check_tensor("video", frames, FRAMES_AXES)
    if frames.shape[-1] < 3:
        raise ValueError(f"The video has the shape {list(frames.shape)}; it must be {FRAMES_AXES}, channels last.")


def check_image(image: Any, interleave: Any) -> Tensor | None:
    """The one image [H,W,3] of a prompt, of floats in 0..1, if there is one."""
    if type(interleave) is not int or not 1 <= interleave <= MAX_INTERLEAVE:
        raise ValueError(f"image_interleave is {_shown(interleave)}; it must be an int from 1 to {MAX_INTERLEAVE}.")
    if image is None:
        return None
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        raise ValueError("image is torch.uint8; it must be of floats in 0..1. Give image.float() / 255.")
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    check_tensor("image", image, IMAGE_AXES)
    if image.shape[-1] < 3:
        raise ValueError(f"The image has the shape {list(image.shape)}; it must be {IMAGE_AXES}, channels last.")
    return image[..., :3]


def check_tokens(part: Any, ids: Any, length: Any, embeddings: Any) -> None:
    """The tokens of one text, for one text encoder."""
    check_kind("part", part, str)
    check_kind("ids", ids, Tensor)
    check_kind("embeddings", embeddings, Mapping)
    if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids has the shape {list(ids.shape)} and the dtype {ids.dtype}; it must be [S], torch.int64.")
    if len(ids) > MAX_TEXT_TOKENS:
        raise ValueError(
            f"The text has {len(ids):,} tokens; at most {MAX_TEXT_TOKENS:,} are accepted, of which models were trained "
            "on a few hundred. Shorten it."
        )
    if type(length) is not int or not 0 < length <= len(ids):
        raise ValueError(f"length is {_shown(length)}; it must be an int from 1 to the number of ids, {len(ids)}.")
    for place, embedding in embeddings.items():
        if type(place) is not int or not 0 <= place < len(ids):
            raise ValueError(f"An embedding is in place {_shown(place)}; places are from 0 to {len(ids) - 1}.")
        check_tensor("embedding", embedding, "[n,D]")


def check_conditioning(name: str, given: Any, optional: bool = False) -> None:
    """`given` must be a text embedding, or a `Conditioning`."""
    check_kind(name, given, Tensor, Conditioning, optional=optional)
    parts = asdict(given) if isinstance(given, Conditioning) else {"text": given}
    _check_entries(name, parts.pop("tensors", {}), parts.pop("numbers", {}))
    for part, tensor in parts.items():
        shown = name if part == "text" else f"{name}'s {part}"
        check_tensor(shown, tensor, optional=part != "text" or given is None)


def check_history(history: Any) -> dict[str, Tensor]:
    """The tensors that a job has returned next to its latent, if there are any."""
    if history is None:
        return {}
    check_kind("history", history, Mapping)
    if len(history) > MAX_ENTRIES or not all(isinstance(name, str) for name in history):
        raise ValueError("history has unknown entries; give the `tensors` of the Result of the job before.")
    for name, tensor in history.items():
        check_tensor(f"history's {name}", tensor, floats=False)
    return dict(history)


def _check_entries(name: str, tensors: Any, numbers: Any) -> None:
    """Checks a conditioning's further entries."""
    for kind, entries in (("tensors", tensors), ("numbers", numbers)):
        check_kind(f"{name}'s {kind}", entries, dict)
        named = all(isinstance(entry, str) and 0 < len(entry) <= MAX_ENTRY_NAME for entry in entries)
        if len(entries) > MAX_ENTRIES or not named:
            raise ValueError(
                f"{name}'s {kind} have {len(entries)} entries; there can be {MAX_ENTRIES}, each named by a str of 1 to "
                f"{MAX_ENTRY_NAME} characters."
            )
    for entry, tensor in tensors.items():
        check_whole(f"An entry of {name}'s tensors", entry)
        check_tensor(f"{name}'s {entry}", tensor, floats=False)
    for entry, number in numbers.items():
        check_whole(f"An entry of {name}'s numbers", entry)
        check_kind(f"{name}'s {entry}", number, int, float, optional=True)
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name}'s {entry} is {number}; give a finite number, or None.")


def _shown(value: Any) -> str:
    """A value for an error text: itself if it is short, else its type."""
    text = repr(value) if isinstance(value, (str, int, float, list, tuple, dict, type(None))) else ""
    return text if 0 < len(text) <= 60 else f"of type {type(value).__name__}"
