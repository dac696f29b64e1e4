"""The inputs that a sampler outside of the ranks gives a network (`shared.conditioning.Inputs`): checks of them, and
timesteps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...hardware import devices
from ...ops.finite import check_finite
from .conditioning import Inputs, Reads

TEXT, CONCAT = "text", "concat"  # the names of a prompt's tokens and of further channels
# Inputs of core ComfyUI's models that no network here reads, and what to do.
INPUT_CURES = {
    "vace_context": "It belongs to a VACE model, which is not supported. Load a text-to-video or image-to-video model.",
    "camera_conditions": "It moves the camera of a Fun Camera model, which is not supported. Remove its node.",
    "audio_embed": "It belongs to a model that reads sound, which is not supported. Remove its node.",
    "context_latents": "It gives a Bernini model further videos, which is not supported. Remove its node.",
    "ref_latent": "It comes from HunyuanImageToVideo with the guidance_type custom, for other models. Choose v1 "
    "(concat) for an image-to-video model with 33 in_channels, else v2 (replace).",
    "txt_byt5": "It belongs to HunyuanVideo 1.5, which is another model. Encode the prompt with the text encoders of "
    "HunyuanVideo (llava_llama3 and clip_l).",
}
OTHER_CURE = "Remove the node that adds it to the conditioning."


def timesteps_on(device: torch.device, timesteps: Tensor, batch: int) -> Tensor:
    """[B], or [B, T] if frames have timesteps of their own: in fp32 on this device, which nobody waits for."""
    timesteps = timesteps.to(torch.float32)
    if timesteps.ndim == 2 and (timesteps == timesteps[:, :1]).all():
        timesteps = timesteps[:, 0]
    if timesteps.ndim == 1 and (timesteps == timesteps[0]).all():
        return torch.full((batch,), float(timesteps[0]), device=device)
    return devices.sent(timesteps, device).expand(batch, *timesteps.shape[1:])


def check_names(inputs: Inputs, known: frozenset[str], cures: Mapping[str, str] = {}) -> None:
    """Raises ValueError for an input that the network does not read."""
    unknown = sorted(inputs.tensors.keys() - known)
    if unknown:
        cure = {**INPUT_CURES, **cures}.get(unknown[0], OTHER_CURE)
        raise ValueError(f"The conditioning has the input {unknown[0]}, which this model does not read. {cure}")


def check_latent(inputs: Inputs, channels: int, multiple: int = 1) -> None:
    """Raises ValueError for a latent without this number of channels, or whose sides are no multiples."""
    shape = inputs.shape
    if len(shape) != 5 or shape[1] != channels or not min(shape):
        raise ValueError(
            f"The latent has the shape {list(shape)}; this model needs [B,{channels},T,H,W], with all sizes at least "
            "1. Make it with the node for empty latents of this model."
        )
    if shape[3] % multiple or shape[4] % multiple:
        raise ValueError(
            f"The latent has {shape[3]} x {shape[4]} positions; with this model both must be multiples of {multiple}. "
            "Choose another width or height."
        )


def check_text(inputs: Inputs, reads: Reads) -> None:
    """Raises ValueError if there is no text, or one of the wrong shape."""
    text, batch, width = inputs.tensors.get(TEXT), inputs.shape[0], reads.text_width
    if text is None:
        raise ValueError("The conditioning has no text. Connect the output of a text encode node.")
    if text.ndim != 3 or not text.shape[1] or text.shape[2] != width or text.shape[0] not in (1, batch):
        raise ValueError(
            f"The text has the shape {list(text.shape)}; this model needs [{batch}, tokens, {width}]. Encode the "
            "prompt with the text encoder that belongs to the model."
        )


def check_finite_inputs(inputs: Inputs) -> None:
    """Raises ValueError for inputs with numbers that are not finite."""
    for name, tensor in inputs.tensors.items():
        check_finite(tensor, f"The conditioning's {name}")


def check_concat(inputs: Inputs, channels: int) -> None:
    """Raises ValueError if the further channels are missing, not as many, or not of the latent's size."""
    concat = inputs.tensors.get(CONCAT)
    batch, _, *size = inputs.shape
    shape = None if concat is None else list(concat.shape)
    wanted = [[number, channels, *size] for number in (1, batch)] if channels else [None]
    if shape in wanted:
        return
    if not channels:
        raise ValueError(
            f"The conditioning has the input {CONCAT} ({shape[1]} further channels, such as an image's), but this "
            "model reads none. Use an image-to-video model, or connect the prompt's conditioning directly."
        )
    has = f"the shape {shape}" if shape else "no such input"
    raise ValueError(
        f"This model reads {channels} further channels (the input {CONCAT}), of the shape {wanted[-1]}; the "
        f"conditioning has {has}. Make the image conditioning and the latent with the node for this model."
    )


def check_input_shape(inputs: Inputs, name: str, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError for an input that is not [B or 1, *shape]; None: any size above 0."""
    own, batch = list(inputs.tensors[name].shape), inputs.shape[0]
    fits = len(own) == 1 + len(shape) and all(size in (None, length) for size, length in zip(shape, own[1:]))
    if not fits or own[0] not in (1, batch) or 0 in own:
        wanted = ", ".join(str(size or "any") for size in (batch, *shape))
        raise ValueError(
            f"The conditioning's {name} has the shape {own}; with this latent and this model it must be [{wanted}]. "
            "Make it with the node and the models that belong to this model."
        )
