"""What a sampler outside of the ranks gives a Wan transformer, as core ComfyUI's models make it.

Sizes that are no multiples of a patch's are padded by wrapping around; further frames follow the latent's. Both are cut
off the velocity (comfy/ldm/wan/model.py of ComfyUI).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.conditioning import Branch, Inputs, Reads, ready
from ..shared.outer import (
    CONCAT,
    TEXT,
    check_concat,
    check_finite_inputs,
    check_latent,
    check_names,
    check_input_shape,
    check_text,
    timesteps_on,
)
from .context import Context
from .files.configs import REFERENCE_CHANNELS

IMAGE, FURTHER_FRAMES, REFERENCE = "clip_fea", "time_dim_concat", "reference_latent"
MASK = "denoise_mask"  # core's models make timesteps of it, and pass it on besides
READ = frozenset({TEXT, CONCAT, IMAGE, FURTHER_FRAMES, REFERENCE, MASK})


@dataclass(frozen=True, eq=False)
class OuterWanBranch(Branch):
    """text [B, L, D]; image [B or 2B, I, image_dim], as diffusers' embedder takes it, and image_tokens: see `Context`;
    concat [B, C', T, H, W]: further channels; further [B, C_in, T', H', W']: frames that follow, padded; reference
    [B, C, H, W]: an image whose tokens come first.

    shape: of the latent. size: of all tokens' positions [T, H, W], see `size_read`. patch: of a token [T, H, W].
    """

    text: Tensor
    image: Tensor | None
    image_tokens: int | None
    concat: Tensor | None
    further: Tensor | None
    reference: Tensor | None
    shape: tuple[int, ...]
    size: tuple[int, int, int]
    patch: tuple[int, int, int]

    def context(self) -> Context:
        return Context(self.text, self.image, self.image_tokens, self.reference)

    def input(self, latent: Tensor) -> Tensor:
        latent = latent if self.concat is None else torch.cat([latent, self.concat], dim=1)
        latent = padded(latent, self.patch)
        return latent if self.further is None else torch.cat([latent, self.further], dim=2)

    def timestep(self, timestep: float) -> Tensor:
        return self.timesteps(torch.full((len(self.text),), timestep))

    def timesteps(self, timesteps: Tensor) -> Tensor:
        """[B], or [B, S] for frames with timesteps of their own. The tokens, in their order, are dealt out to the
        timesteps in equal parts, the last of which may be shorter, as by core ComfyUI: with a reference or further
        frames, these parts are not the latent's frames."""
        timesteps = timesteps_on(self.text.device, timesteps, len(self.text))
        if timesteps.ndim == 1:
            return timesteps
        tokens = math.prod(length // patch for length, patch in zip(self.size, self.patch))
        part = -(-tokens // timesteps.shape[1])
        return timesteps.repeat_interleave(part, dim=1)[:, :tokens]

    def output(self, velocity: Tensor) -> Tensor:
        frames, height, width = self.shape[2:]
        return velocity[:, :, :frames, :height, :width]


def size_read(inputs: Inputs, patch: Sequence[int]) -> tuple[int, int, int]:
    """The size [T, H, W] of the positions of all tokens: those of a reference come before the latent's."""
    frames, height, width = (length + -length % size for length, size in zip(inputs.shape[2:], patch))
    further = inputs.tensors.get(FURTHER_FRAMES)
    frames += 0 if further is None else further.shape[2] + -further.shape[2] % patch[0]
    return frames + patch[0] * (REFERENCE in inputs.tensors), height, width


def padded(video: Tensor, patch: Sequence[int]) -> Tensor:
    """A video [B, C, T, H, W] whose sizes are multiples of a patch's, by wrapping around."""
    frames, rows, columns = (-length % size for length, size in zip(video.shape[2:], patch))
    if not frames + rows + columns:
        return video
    return F.pad(video, (0, columns, 0, rows, 0, frames), mode="circular")


def in_two(image: Tensor, places: int) -> Tensor:
    """[2B, places / 2, D], as diffusers' embedder with places for two images takes tokens [B, I, D] of an image, or of
    two: filled up with zeros."""
    return F.pad(image, (0, 0, 0, places - image.shape[1])).unflatten(1, (2, -1)).flatten(0, 1)


def branch_of(config: Mapping[str, Any], inputs: Inputs, device: torch.device, dtype: torch.dtype) -> OuterWanBranch:
    """See `Conditioner.outer_branch`."""
    patch, batch = tuple(config["patch_size"]), inputs.shape[0]

    def given(name: str) -> Tensor | None:
        tensor = inputs.tensors.get(name)
        return None if tensor is None else ready(tensor, batch, device, dtype)

    image, further = given(IMAGE), given(FURTHER_FRAMES)
    places, tokens = config["pos_embed_seq_len"], None
    if image is not None and places is not None:
        tokens = min(image.shape[1], places)
        image = in_two(image[:, :tokens], places)
    return OuterWanBranch(
        text=given(TEXT),
        image=image,
        image_tokens=tokens,
        concat=given(CONCAT),
        further=None if further is None else padded(further, patch),
        reference=given(REFERENCE),
        shape=tuple(inputs.shape),
        size=size_read(inputs, patch),
        patch=patch,
    )


def check(config: Mapping[str, Any], reads: Reads, inputs: Inputs) -> None:
    """See `Conditioner.check_inputs`."""
    check_names(inputs, READ)
    check_latent(inputs, reads.form.channels)
    check_text(inputs, reads)
    check_concat(inputs, config["in_channels"] - config["out_channels"])
    if IMAGE in inputs.tensors:
        _check_image(config, inputs)
    if FURTHER_FRAMES in inputs.tensors:
        _check_further(config, inputs)
    if REFERENCE in inputs.tensors:
        _check_reference(config, inputs)
    check_finite_inputs(inputs)


def _check_image(config: Mapping[str, Any], inputs: Inputs) -> None:
    if config["image_dim"] is None:
        raise ValueError(
            f"The conditioning has the input {IMAGE}, of a CLIP vision model, which this model does not read, like "
            "all Wan 2.2 models and text-to-video models. Disconnect clip_vision_output from the image-to-video node."
        )
    check_input_shape(inputs, IMAGE, (None, config["image_dim"]))


def _check_further(config: Mapping[str, Any], inputs: Inputs) -> None:
    check_input_shape(inputs, FURTHER_FRAMES, (config["in_channels"], None, *inputs.shape[3:]))


def _check_reference(config: Mapping[str, Any], inputs: Inputs) -> None:
    channels, height, width = config.get(REFERENCE_CHANNELS), *inputs.shape[3:]
    if channels is None:
        raise ValueError(
            f"The conditioning has the input {REFERENCE} (a ref_image), which this model does not read. Disconnect "
            "the reference image, or use a Fun Control model that has a layer for it (ref_conv)."
        )
    if height % config["patch_size"][1] or width % config["patch_size"][2]:
        raise ValueError(
            f"With a reference image, rows and columns of the latent must be even; they are {height} x {width}. Choose "
            "another width or height."
        )
    check_input_shape(inputs, REFERENCE, (channels, height, width))
