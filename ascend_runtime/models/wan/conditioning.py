"""How Wan transformers are conditioned on text, images and known frames.

An image-to-video model takes extra channels: a mask, and the latent of the known part of the video. Wan2.2-TI2V-5B has
no such channels: known frames replace those of its latent, and their tokens have timestep 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.finite import check_finite
from ..shared.conditioning import Branch, Conditioner, Given, Inputs, Prompt, Reads, check_shape, ready
from . import outer
from .context import Context
from .files.configs import MASK_CHANNELS, reads_control
from .latents import CHANNELS_22, LATENTS_MEAN_22


@dataclass(frozen=True, eq=False)
class WanBranch(Branch):
    """text [B, L, D]; image [B or 2B, I, image_dim], as diffusers' embedder takes it; concat [B, 4 + C, T, H, W]: the
    extra channels; timesteps: factors of the timestep, ones [B], or [B, S] if known tokens have timestep 0."""

    text: Tensor
    image: Tensor | None
    concat: Tensor | None
    timesteps: Tensor

    def context(self) -> Context:
        return Context(self.text, self.image)

    def input(self, latent: Tensor) -> Tensor:
        return latent if self.concat is None else torch.cat([latent, self.concat], dim=1)

    def timestep(self, timestep: float) -> Tensor:
        return timestep * self.timesteps


class WanConditioner(Conditioner):
    empty_latent = (
        "Use an empty video latent: from EmptyHunyuanLatentVideo for 16 channels, from Wan22ImageToVideoLatent or "
        "Ascend Image To Video for 48."
    )

    @property
    def sees_known_clean(self) -> bool:
        return self.form.channels == CHANNELS_22

    def per_token(self, given: Given) -> bool:
        return given.noise_mask is not None and self.sees_known_clean

    @property
    def _extra_channels(self) -> int:
        """The number of input channels besides the latent; 0 for a text-to-video model."""
        return self.config["in_channels"] - self.config["out_channels"]

    def branch(self, prompt: Prompt, given: Given, device: torch.device, dtype: torch.dtype) -> WanBranch:
        image, concat = prompt.clip_vision, None
        if image is not None:
            image = ready(image, given.batch, device, dtype)
            if self.config["pos_embed_seq_len"] is not None:  # two images, which diffusers' embedder concatenates
                image = image.unflatten(1, (2, -1)).flatten(0, 1)
        if self._extra_channels:
            concat = ready(self._concat(prompt, given), given.batch, device, dtype)
        text = ready(prompt.text, given.batch, device, dtype)
        return WanBranch(text, image, concat, self._timesteps(given).to(device))

    def _timesteps(self, given: Given) -> Tensor:
        """The timestep of a partly known frame is scaled by its unknown fraction, as in core ComfyUI."""
        batch, _, _, height, width = given.latent.shape
        if not self.per_token(given):
            return torch.ones(batch)
        _, patch_height, patch_width = self.config["patch_size"]
        by_frame = given.noise_mask.float().mean(dim=(1, 3, 4)).expand(batch, -1)
        return by_frame.repeat_interleave(height // patch_height * (width // patch_width), dim=1)

    def _concat(self, prompt: Prompt, given: Given) -> Tensor:
        """[B or 1, 4 + C, T, H, W]: a mask, 1 where the video is known, and the known video, normalised.

        Missing inputs are zeros, and the latent's noise mask replaces a missing mask, as in core ComfyUI.
        """
        shape = given.latent.shape
        video, mask = prompt.concat_latent, prompt.concat_mask
        video = torch.zeros(1, *shape[1:]) if video is None else self.latents.normalised(video.float())
        mask = given.noise_mask if mask is None else mask
        mask = torch.zeros(1, 1, *shape[2:]) if mask is None else 1 - mask.float()
        batch = max(video.shape[0], mask.shape[0])
        mask = mask.expand(batch, MASK_CHANNELS, -1, -1, -1)
        return torch.cat([mask, video.expand(batch, -1, -1, -1, -1)], dim=1)

    # For samplers outside of the ranks

    def check_inputs(self, inputs: Inputs) -> None:
        outer.check(self.config, Reads(self.form, self.text_width), inputs)

    def outer_branch(self, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> outer.OuterWanBranch:
        return outer.branch_of(self.config, inputs, device, dtype)

    def outer_size(self, inputs: Inputs) -> tuple[int, int, int]:
        return outer.size_read(inputs, self.config["patch_size"])

    # Checks

    def check(self, given: Given) -> None:
        if reads_control(self.config):
            raise ValueError(
                f"This is a Fun Control model, which reads {self._extra_channels} further channels, those of a control "
                "video among them; Ascend Sampler cannot give them. Load it with Ascend Load Diffusion Model (Core), "
                "and sample with KSampler."
            )
        super().check(given)

    def check_prompt(self, name: str, prompt: Prompt, given: Given) -> None:
        self._check_concat(name, prompt, given.latent)
        self._check_image(name, prompt.clip_vision, given.batch)

    def _check_concat(self, name: str, prompt: Prompt, latent: Tensor) -> None:
        parts = {"concat_latent": prompt.concat_latent, "concat_mask": prompt.concat_mask}
        parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if parts and not self._extra_channels:
            raise ValueError(
                f"The {name} conditioning carries an image ({' and '.join(parts)}), but this model has no input for "
                "it. Use an image-to-video model, whose transformer has 36 in_channels, or connect the prompt's "
                "conditioning directly."
            )
        for part, tensor in parts.items():
            channels = (latent.shape[1],) if part == "concat_latent" else (1, MASK_CHANNELS)
            check_shape(f"{name} conditioning's {part}", tensor, latent, channels)

    def _check_image(self, name: str, image: Tensor | None, batch: int) -> None:
        width, tokens = self.config["image_dim"], self.config["pos_embed_seq_len"]
        if image is None and width is None:
            return
        if width is None:
            raise ValueError(
                f"The {name} conditioning carries a clip_vision_output, but this model does not use one, like all Wan "
                "2.2 models and text-to-video models. Disconnect it."
            )
        if image is None:
            raise ValueError(
                f"This model needs a clip_vision_output, but the {name} conditioning carries none. Connect CLIP Vision "
                "Encode of the start image (and of the end image) to the image-to-video node."
            )
        if image.ndim != 3 or image.shape[2] != width or image.shape[0] not in (1, batch):
            raise ValueError(
                f"The {name} conditioning's clip_vision_output has the shape {list(image.shape)}; this model needs "
                f"[1, tokens, {width}]. Load the CLIP vision model that belongs to it (clip_vision_h for Wan 2.1)."
            )
        if tokens is not None and image.shape[1] != tokens:
            raise ValueError(
                f"The {name} conditioning's clip_vision_output has {image.shape[1]} tokens; this model needs {tokens}, "
                "of a first and a last image. Connect CLIP Vision Encode of both."
            )
        check_finite(image, f"The {name} conditioning's clip_vision_output")


def empty_latent(shape: tuple[int, ...]) -> Tensor:
    """A latent [B,C,T,H,W] that is zero after normalisation."""
    if shape[1] != CHANNELS_22:
        return torch.zeros(shape)
    return torch.tensor(LATENTS_MEAN_22).view(1, -1, 1, 1, 1).expand(shape).clone()
