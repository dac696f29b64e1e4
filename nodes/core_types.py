"""CONDITIONING, LATENT and IMAGE of core ComfyUI, taken apart for the ranks and put together again."""

from __future__ import annotations

import comfy.clip_vision
import comfy.utils
import torch
from torch import Tensor

from ..ascend_runtime.specs import VaeForm
from ..ascend_runtime.wire.messages import Conditioning

_READ = {"pooled_output", "concat_latent_image", "concat_mask", "clip_vision_output"}


def samples_of(latent: dict) -> Tensor:
    """The tensor [B,C,T,H,W] of a LATENT to be sampled. Raises ValueError for what the ranks cannot honour."""
    if latent.get("batch_index") is not None:
        raise ValueError("The latent has a batch_index, which Ascend Sampler does not honour. Leave it out.")
    return latent["samples"]


def noise_mask_of(latent: dict) -> Tensor | None:
    """The mask [B,1,T,H,W] of a LATENT, brought to its size as core's samplers do."""
    mask, samples = latent.get("noise_mask"), latent["samples"]
    return None if mask is None else comfy.utils.reshape_mask(mask, (samples.shape[0], 1, *samples.shape[2:]))


def conditioning_of(conditioning: list, name: str, samples: Tensor) -> Conditioning:
    """A CONDITIONING of one part, its image brought to the size of `samples` [B,C,T,H,W] as core's models do.

    Raises ValueError rather than leave out what else it asks for.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"The {name} conditioning has {len(conditioning)} parts; Ascend Sampler takes one. "
            "Put the prompts into one text instead of combining conditionings."
        )
    text, extras = conditioning[0]
    extras = {key: value for key, value in extras.items() if value is not None}
    unknown = sorted(extras.keys() - _READ)
    if unknown:
        raise ValueError(
            f"The {name} conditioning carries {', '.join(unknown)}, which Ascend Sampler does not honour. "
            "Connect the output of a text encode node directly, or of an image-to-video node."
        )
    image, mask, clip = (extras.get(key) for key in ("concat_latent_image", "concat_mask", "clip_vision_output"))
    return Conditioning(
        text=text,
        pooled=extras.get("pooled_output"),
        concat_latent=None if image is None else _resized(image, samples),
        concat_mask=None if mask is None else _mask(mask, samples),
        clip_vision=None if clip is None else clip.penultimate_hidden_states,
    )


def _mask(mask: Tensor, samples: Tensor) -> Tensor:
    """With 1 or 4 channels; frames that it does not tell of are unknown."""
    mask = mask if mask.shape[1] == 4 else mask.mean(dim=1, keepdim=True)
    mask = _resized(mask, samples)
    missing = max(0, samples.shape[2] - mask.shape[2]) if mask.ndim == 5 else 0
    return torch.nn.functional.pad(mask, (0, 0, 0, 0, 0, missing), value=1.0)


def _resized(tensor: Tensor, samples: Tensor) -> Tensor:
    """In height and width, and to as many videos; one for all stays one."""
    resized = comfy.utils.common_upscale(tensor, samples.shape[-1], samples.shape[-2], "bilinear", "center")
    return resized if resized.shape[0] == 1 else comfy.utils.resize_to_batch_size(resized, samples.shape[0])


def pixels_of(image: Tensor, name: str, width: int, height: int) -> Tensor:
    """An IMAGE [T,h,w,3 or 4] scaled and cropped to [T,height,width,3], as core's video nodes do.

    Raises ValueError, with the name of the input, for one without images or colours.
    """
    if image.ndim != 4 or image.shape[-1] < 3 or 0 in image.shape:
        raise ValueError(
            f"{name} has the shape {list(image.shape)}; an IMAGE is [images, height, width, 3 colours], all 1 or more. "
            "Connect a node that gives at least one image in RGB, such as Load Image, or disconnect it."
        )
    channels_first = image[..., :3].movedim(-1, 1)
    return comfy.utils.common_upscale(channels_first, width, height, "bilinear", "center").movedim(1, -1)


def whole_of(image: Tensor, form: VaeForm) -> Tensor:
    """The frames of an IMAGE [T,H,W,C] that a VAE encodes whole, as core's VAE Encode takes them: of the sides the
    middle, of the frames the first."""
    frames, *sides = image.shape[:3]
    kept = [(0, max(1, (frames - 1) // form.temporal * form.temporal + 1))]
    kept += [(side % form.spatial // 2, side // form.spatial * form.spatial) for side in sides]
    for dim, (start, size) in enumerate(kept):
        image = image.narrow(dim, start, size) if 0 < size < image.shape[dim] else image
    return image


def joined(*outputs: comfy.clip_vision.Output | None) -> comfy.clip_vision.Output | None:
    """What CLIP saw in images one behind the other; None where there is none."""
    given = [output for output in outputs if output is not None]
    if len(given) < 2:
        return given[0] if given else None
    both = comfy.clip_vision.Output()
    both.penultimate_hidden_states = torch.cat([output.penultimate_hidden_states for output in given], dim=-2)
    return both
