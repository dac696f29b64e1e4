"""What a sampler outside of the ranks gives a HunyuanVideo transformer, as core ComfyUI's models make it.

Where core ComfyUI's network (comfy/ldm/hunyuan_video/model.py) differs from diffusers', its formulas hold here: the
mean of the text includes the tokens that a mask excludes, and a clean first frame is guided too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.precision import NORMS
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
from .context import GUIDANCE_UNIT, Context
from .files.configs import GUIDING_FRAME

POOLED, GUIDANCE, MASK = "y", "guidance", "attention_mask"
READ = frozenset({TEXT, CONCAT, POOLED, GUIDANCE, MASK, GUIDING_FRAME})
OWN_CURES = {
    "clip_fea": "HunyuanVideo reads an image through its text encoder: use TextEncodeHunyuanVideo_ImageToVideo.",
}


@dataclass(frozen=True, eq=False)
class OuterHunyuanBranch(Branch):
    """given: what the network reads besides latent and timestep. concat [B, C', T, H, W]: further channels."""

    given: Context
    concat: Tensor | None

    @property
    def text(self) -> Tensor:
        return self.given.text

    def context(self) -> Context:
        return self.given

    def input(self, latent: Tensor) -> Tensor:
        return latent if self.concat is None else torch.cat([latent, self.concat], dim=1)

    def timestep(self, timestep: float) -> Tensor:
        return self.timesteps(torch.full((len(self.text),), timestep))

    def timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps_on(self.text.device, timesteps, len(self.text))


def branch_of(
    config: Mapping[str, Any], inputs: Inputs, device: torch.device, dtype: torch.dtype
) -> OuterHunyuanBranch:
    """See `Conditioner.outer_branch`."""
    tensors, batch = inputs.tensors, inputs.shape[0]

    def given(name: str) -> Tensor | None:
        return ready(tensors[name], batch, device, dtype) if name in tensors else None

    text, guidance, mean = given(TEXT), given(GUIDANCE), None
    if MASK in tensors:
        mean = text.mean(1, dtype=NORMS.dtype).type_as(text)
        text = ready(tensors[TEXT][:, tensors[MASK][0] != 0], batch, device, dtype)
    if guidance is None or not config["guidance_embeds"]:
        guidance = None  # core gives a scale to models that read none, too
    else:
        guidance = (guidance * GUIDANCE_UNIT).float()
    pooled = given(POOLED)[:, : config["pooled_projection_dim"]]
    context = Context(text, pooled, guidance, GUIDING_FRAME in tensors, whole_vector=True, mean=mean)
    return OuterHunyuanBranch(context, given(CONCAT))


def check(config: Mapping[str, Any], reads: Reads, inputs: Inputs) -> None:
    """See `Conditioner.check_inputs`."""
    check_names(inputs, READ, OWN_CURES)
    check_latent(inputs, reads.form.channels, config["patch_size"])
    check_text(inputs, reads)
    check_concat(inputs, config["in_channels"] - config["out_channels"])
    for name in (GUIDANCE, GUIDING_FRAME):
        if name in inputs.tensors:
            check_input_shape(inputs, name, ())
    _check_pooled(inputs, reads.pooled_width)
    _check_mask(inputs)
    _check_guiding_frame(inputs)
    check_finite_inputs(inputs)


def _check_pooled(inputs: Inputs, width: int) -> None:
    pooled, batch = inputs.tensors.get(POOLED), inputs.shape[0]
    if pooled is None or pooled.ndim != 2 or pooled.shape[1] < width or pooled.shape[0] not in (1, batch):
        has = "no pooled vector" if pooled is None else f"a pooled vector of the shape {list(pooled.shape)}"
        raise ValueError(
            f"The conditioning has {has} (the input {POOLED}); this model reads [{batch}, {width}]. Encode the prompt "
            "with the text encoders that belong to the model (DualCLIPLoader with clip_l and llava_llama3)."
        )


def _check_mask(inputs: Inputs) -> None:
    """Videos of one pass have texts of one length; which tokens are left out does not matter."""
    mask = inputs.tensors.get(MASK)
    if mask is None:
        return
    check_input_shape(inputs, MASK, (inputs.tensors[TEXT].shape[1],))
    read = mask != 0
    if mask.is_floating_point() or not read.any() or (read != read[:1]).any():
        raise ValueError(
            f"The conditioning's {MASK} must be of integers, 0 for the tokens that are not read, leave some to read, "
            "and be the same for all videos of a batch. Use the mask that the text encoder made, or none."
        )


def _check_guiding_frame(inputs: Inputs) -> None:
    frame = inputs.tensors.get(GUIDING_FRAME)
    if frame is not None and frame.any():
        raise ValueError(
            f"The conditioning has the input {GUIDING_FRAME}, which replaces a frame (v2): {frame.tolist()}. Only the "
            "first frame, 0, can be given. Make it with HunyuanImageToVideo."
        )
