"""Conversion between core ComfyUI's CONDITIONING, LATENT and IMAGE and what the ranks take."""

from __future__ import annotations

import comfy.clip_vision
import comfy.utils
import torch
from torch import Tensor

from ..ascend_runtime.models.registry import mask_channels
from ..ascend_runtime.specs import VaeForm
from ..ascend_runtime.wire.messages import Conditioning

# The entries of a CONDITIONING with a field of their own in `Conditioning`; others go along by name.
_FIELDS = {"pooled_output", "concat_latent_image", "concat_mask", "clip_vision_output"}


def samples_of(latent: dict) -> Tensor:
    """The tensor [B,C,T,H,W] of a LATENT to sample. Raises ValueError for what the ranks do not support."""
    if latent.get("batch_index") is not None:
        raise ValueError("The latent has a batch_index, which Ascend Sampler does not support. Leave it out.")
    return latent["samples"]


def noise_mask_of(latent: dict) -> Tensor | None:
    """The mask [B,1,T,H,W] of a LATENT, resized to the latent as core's samplers do."""
    mask, samples = latent.get("noise_mask"), latent["samples"]
    return None if mask is None else comfy.utils.reshape_mask(mask, (samples.shape[0], 1, *samples.shape[2:]))


def conditioning_of(conditioning: list, name: str, samples: Tensor) -> Conditioning:
    """A CONDITIONING of one part, its image resized to `samples` [B,C,T,H,W] as core's models do.

    Further tensors and numbers go along by name: the model reads them, or refuses them by name. Raises ValueError for
    several parts, and for entries of other kinds, such as areas, hooks and ControlNets.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"The {name} conditioning has {len(conditioning)} parts; Ascend Sampler takes one. "
            "Put the prompts into one text instead of combining conditionings."
        )
    text, extras = conditioning[0]
    further = {key: value for key, value in extras.items() if key not in _FIELDS}
    tensors = {key: value for key, value in further.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in further.items() if _is_number(value)}
    unknown = sorted(map(str, further.keys() - tensors.keys() - numbers.keys()))
    if unknown:
        raise ValueError(
            f"The {name} conditioning carries {', '.join(unknown)}, which Ascend Sampler does not support. "
            "Connect the output of a text encode node directly, or of an image-to-video node."
        )
    image, mask, clip = (extras.get(key) for key in ("concat_latent_image", "concat_mask", "clip_vision_output"))
    return Conditioning(
        text=text,
        pooled=extras.get("pooled_output"),
        concat_latent=None if image is None else _resized(image, samples),
        concat_mask=None if mask is None else _mask(mask, samples),
        clip_vision=None if clip is None else clip.penultimate_hidden_states,
        tensors=tensors,
        numbers=numbers,
    )


def _is_number(value) -> bool:
    """Whether an entry is a number, or None, which some models read as "without"."""
    return value is None or isinstance(value, (int, float)) and not isinstance(value, bool)


def _mask(mask: Tensor, samples: Tensor) -> Tensor:
    """The mask, resized to `samples`, with as many channels as some model reads, else with 1. Frames that it does not
    cover count as unknown (1)."""
    mask = mask if mask.shape[1] in mask_channels() else mask.mean(dim=1, keepdim=True)
    mask = _resized(mask, samples)
    missing = max(0, samples.shape[2] - mask.shape[2]) if mask.ndim == 5 else 0
    return torch.nn.functional.pad(mask, (0, 0, 0, 0, 0, missing), value=1.0)


def _resized(tensor: Tensor, samples: Tensor) -> Tensor:
    """Resized to the height, width and batch of `samples`; a batch of one stays one."""
    resized = comfy.utils.common_upscale(tensor, samples.shape[-1], samples.shape[-2], "bilinear", "center")
    return resized if resized.shape[0] == 1 else comfy.utils.resize_to_batch_size(resized, samples.shape[0])


def pixels_of(image: Tensor, name: str, width: int, height: int) -> Tensor:
    """An IMAGE [T,h,w,3 or 4] scaled and cropped to [T,height,width,3], as core's video nodes do.

    name: of the input, for the ValueError about an IMAGE without images or colours.
    """
    if image.ndim != 4 or image.shape[-1] < 3 or 0 in image.shape:
        raise ValueError(
            f"{name} has the shape {list(image.shape)}; an IMAGE is [images, height, width, 3 colours], each at least "
            "1. Connect a node that outputs at least one RGB image, such as Load Image, or disconnect the input."
        )
    channels_first = image[..., :3].movedim(-1, 1)
    return comfy.utils.common_upscale(channels_first, width, height, "bilinear", "center").movedim(1, -1)


def whole_of(image: Tensor, form: VaeForm) -> Tensor:
    """An IMAGE [T,H,W,C] cropped to what a VAE encodes, as in core's VAE Encode: the first frames, and the middle of
    the height and width."""
    frames, *sides = image.shape[:3]
    kept = [(0, max(1, (frames - 1) // form.temporal * form.temporal + 1))]
    kept += [(side % form.spatial // 2, side // form.spatial * form.spatial) for side in sides]
    for dim, (start, size) in enumerate(kept):
        image = image.narrow(dim, start, size) if 0 < size < image.shape[dim] else image
    return image


def joined(*outputs: comfy.clip_vision.Output | None) -> comfy.clip_vision.Output | None:
    """CLIP's hidden states of several images, one after the other along the tokens; None if there are none."""
    given = [output for output in outputs if output is not None]
    if len(given) < 2:
        return given[0] if given else None
    both = comfy.clip_vision.Output()
    both.penultimate_hidden_states = torch.cat([output.penultimate_hidden_states for output in given], dim=-2)
    return both
