"""What of a job's conditioning reaches the network, checked: texts, images, and what of the video is known.

An image-to-video model reads, beside the noisy latent, a mask and the latent of the video as far as it is known.
Wan2.2-TI2V-5B has no such channels: what is known stands in its latent itself, and its tokens have timestep 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..components import DiffusionModel
from ..models.context import Context
from ..models.wan import transformer as wan
from ..models.wan.defaults import TI2V_CHANNELS
from ..ops.precision import check_finite
from ..specs import SampleSpec, VideoSize
from ..wire.messages import Conditioning, Sample
from .sampling import Known, noise_of


@dataclass(frozen=True)
class Branch:
    """One branch of guidance on this rank's device, in the dtype of the blocks.

    text [B, L, D]; image [B or 2B, I, image_dim], as diffusers' embedder takes it; concat [B, 4 + C, T, H, W].
    """

    text: Tensor
    image: Tensor | None
    concat: Tensor | None

    def context(self) -> Context:
        """A new one, for another network than the last."""
        return Context(self.text, self.image)

    def beside(self, latent: Tensor) -> Tensor:
        """What the network reads: latent [B, C, T, H, W] and what stands beside it."""
        return latent if self.concat is None else torch.cat([latent, self.concat], dim=1)


def check(message: Sample, spec: SampleSpec, model: DiffusionModel) -> None:
    """Raises ValueError, before any exchange, for what this model cannot honour. spec: filled."""
    _check_latent(message.latent, model)
    if model.guided(spec) and message.negative is None:
        raise ValueError(
            f"guidance_scale is {spec.guidance_scale}, which needs a negative prompt; "
            "connect one (an empty text will do) or set guidance_scale to 1."
        )
    if message.noise_mask is not None:
        _check_shape("noise_mask", message.noise_mask, message.latent, channels=(1,))
    for name, conditioning in (("positive", message.positive), ("negative", message.negative)):
        if conditioning is not None:
            _check_text(name, conditioning.text, message.latent.shape[0], model)
            _check_concat(name, conditioning, message.latent, model)
            _check_image(name, conditioning.clip_vision, message.latent.shape[0], model)


def branches_of(message: Sample, model: DiffusionModel, device: torch.device) -> dict[str, Branch]:
    """By name, "cond" and, where there is a negative prompt, "uncond"."""
    given = {"cond": message.positive, "uncond": message.negative}
    return {name: _branch(one, message, model, device) for name, one in given.items() if one is not None}


def start_of(message: Sample, model: DiffusionModel) -> Tensor:
    """The latent to start from, normalised; an empty one is zeros in either form."""
    start = message.latent.float()
    return _normalised(start, model) if start.any() else start


def known_of(message: Sample, start: Tensor, model: DiffusionModel) -> Known | None:
    """What of the video is given and stays: clean where the model knows it by its timestep, else noisy as the rest."""
    if message.noise_mask is None:
        return None
    noise = None if _knows_by_timestep(model) else noise_of(start.shape, message.spec.seed)
    return Known(start, message.noise_mask.float().expand(start.shape[0], -1, -1, -1, -1), noise)


def timesteps_of(message: Sample, model: DiffusionModel, device: torch.device) -> Tensor:
    """What a timestep is multiplied by: ones [B], or [B, S] where known tokens have timestep 0.

    A frame that is known in part has that part of the timestep, as in core ComfyUI.
    """
    batch, _, _, height, width = message.latent.shape
    if message.noise_mask is None or not _knows_by_timestep(model):
        return torch.ones(batch, device=device)
    _, patch_height, patch_width = model.high_noise.config.patch_size
    by_frame = message.noise_mask.float().mean(dim=(1, 3, 4)).expand(batch, -1)
    return by_frame.repeat_interleave(height // patch_height * (width // patch_width), dim=1).to(device)


def _knows_by_timestep(model: DiffusionModel) -> bool:
    return model.high_noise.config.out_channels == TI2V_CHANNELS


def _branch(given: Conditioning, message: Sample, model: DiffusionModel, device: torch.device) -> Branch:
    batch = message.latent.shape[0]

    def ready(tensor: Tensor) -> Tensor:
        return tensor.to(device, model.dtype).expand(batch, *[-1] * (tensor.ndim - 1))

    image, concat = given.clip_vision, None
    if image is not None:
        image = ready(image)
        if model.high_noise.config.pos_embed_seq_len is not None:  # two images, which diffusers' embedder joins itself
            image = image.unflatten(1, (2, -1)).flatten(0, 1)
    if _extra_channels(model):
        concat = ready(_concat(given, message, model))
    return Branch(ready(given.text), image, concat)


def _concat(given: Conditioning, message: Sample, model: DiffusionModel) -> Tensor:
    """[B or 1, 4 + C, T, H, W]: 1 where the video is known, and the known video, normalised.

    What is not given is zeros, as in core ComfyUI, where the latent's own mask also stands in for a missing one.
    """
    shape = message.latent.shape
    video, mask = given.concat_latent, given.concat_mask
    video = torch.zeros(1, *shape[1:]) if video is None else _normalised(video.float(), model)
    mask = message.noise_mask if mask is None else mask
    mask = torch.zeros(1, 1, *shape[2:]) if mask is None else 1 - mask.float()
    batch = max(video.shape[0], mask.shape[0])
    mask = mask.expand(batch, wan.MASK_CHANNELS, -1, -1, -1)
    return torch.cat([mask, video.expand(batch, -1, -1, -1, -1)], dim=1)


def _normalised(latent: Tensor, model: DiffusionModel) -> Tensor:
    return (latent - model.latents_mean) / model.latents_std


def _extra_channels(model: DiffusionModel) -> int:
    """What the network reads beside the latent; 0 for a text-to-video model."""
    return model.high_noise.config.in_channels - model.high_noise.config.out_channels


# Checks


def _check_latent(latent: Tensor, model: DiffusionModel) -> None:
    channels = model.high_noise.config.out_channels
    if latent.ndim != 5 or latent.shape[1] != channels or not latent.numel():
        raise ValueError(
            f"The latent has the shape {list(latent.shape)}; this model makes videos of [B,{channels},T,H,W], "
            "all 1 or more. Use an empty video latent for it: EmptyHunyuanLatentVideo for 16 channels, "
            "Wan22ImageToVideoLatent or Ascend Image To Video for 48."
        )
    _, _, frames, height, width = latent.shape
    VideoSize(width=8 * width, height=8 * height, num_frames=4 * frames - 3)
    check_finite(latent, "The latent")


def _check_text(name: str, text: Tensor, batch: int, model: DiffusionModel) -> None:
    width = model.high_noise.config.text_dim
    if text.ndim != 3 or not text.shape[1] or text.shape[2] != width or text.shape[0] not in (1, batch):
        raise ValueError(
            f"The {name} conditioning has the shape {list(text.shape)}; this model reads [1, tokens, {width}], "
            f"or one such for each of the {batch} videos of the latent. "
            "Encode the prompt with the text encoder that belongs to the model."
        )
    check_finite(text, f"The {name} conditioning")


def _check_concat(name: str, given: Conditioning, latent: Tensor, model: DiffusionModel) -> None:
    parts = {"concat_latent": given.concat_latent, "concat_mask": given.concat_mask}
    parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
    if parts and not _extra_channels(model):
        raise ValueError(
            f"The {name} conditioning carries an image ({' and '.join(parts)}), but this model reads none besides its "
            "latent. Take an image-to-video model, whose transformer has 36 in_channels, or connect the prompt's "
            "conditioning directly."
        )
    for part, tensor in parts.items():
        channels = (latent.shape[1],) if part == "concat_latent" else (1, wan.MASK_CHANNELS)
        _check_shape(f"{name} conditioning's {part}", tensor, latent, channels)


def _check_shape(name: str, tensor: Tensor, latent: Tensor, channels: tuple[int, ...]) -> None:
    batch, _, *size = latent.shape
    shape = list(tensor.shape)
    if tensor.ndim != 5 or shape[0] not in (1, batch) or shape[1] not in channels or shape[2:] != size:
        frames, height, width = size
        wanted = " or ".join(f"[{n}, {c}, {frames}, {height}, {width}]" for n in sorted({1, batch}) for c in channels)
        raise ValueError(
            f"The {name} has the shape {shape}; with this latent and this model it must be {wanted}. "
            "Make image conditioning and latent by one node, with the VAE of the model."
        )
    check_finite(tensor, f"The {name}")


def _check_image(name: str, image: Tensor | None, batch: int, model: DiffusionModel) -> None:
    width, tokens = model.high_noise.config.image_dim, model.high_noise.config.pos_embed_seq_len
    if image is None and width is None:
        return
    if width is None:
        raise ValueError(
            f"The {name} conditioning carries a clip_vision_output, but this model looks at none: models of Wan 2.2 "
            "and text-to-video models do without. Disconnect it."
        )
    if image is None:
        raise ValueError(
            f"This model looks at an image through CLIP, but the {name} conditioning carries no clip_vision_output. "
            "Connect CLIP Vision Encode of the start image (and of the end image) to the image-to-video node."
        )
    if image.ndim != 3 or image.shape[2] != width or image.shape[0] not in (1, batch):
        raise ValueError(
            f"The {name} conditioning's clip_vision_output has the shape {list(image.shape)}; this model looks at "
            f"[1, tokens, {width}]. Load the CLIP vision model that belongs to it (clip_vision_h for Wan 2.1)."
        )
    if tokens is not None and image.shape[1] != tokens:
        raise ValueError(
            f"The {name} conditioning's clip_vision_output has {image.shape[1]} tokens; this model looks at "
            f"{tokens}, of a first and a last image. Connect CLIP Vision Encode of both."
        )
    check_finite(image, f"The {name} conditioning's clip_vision_output")
