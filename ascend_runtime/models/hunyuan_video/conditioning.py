"""How HunyuanVideo transformers are conditioned on text, guidance and a first frame.

An image-to-video model of the first form (`CONCAT`, 33 channels) reads further channels: the latent of the known
frames, and a mask. One of the second form (`REPLACE`, 16 channels) finds the first frame without noise in its latent,
and modulates that frame's tokens by a vector of their own. Where no config says so, weights of the second form look as
a text-to-video model's (`EITHER`); there the job's conditioning decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor

from ...ops.finite import check_finite
from ..shared.conditioning import Branch, Conditioner, Given, Inputs, Prompt, Reads, ready
from . import outer
from .context import GUIDANCE_UNIT, Context
from .files.configs import CONCAT, EITHER, GUIDING_FRAME, REPLACE, filled

OWN_GUIDANCE, TEXT_MASK = "guidance", "attention_mask"  # further entries of a conditioning, as core ComfyUI names them


@dataclass(frozen=True, eq=False)
class HunyuanBranch(Branch):
    """text [B, L, D]; pooled [B, D]; guidance [B] or None: see `Context`. concat [B, C + 1, T, H, W]: the further
    channels, or None. replaces: whether the latent's first frame is known and clean."""

    text: Tensor
    pooled: Tensor
    guidance: Tensor | None
    concat: Tensor | None
    replaces: bool

    def context(self) -> Context:
        return Context(self.text, self.pooled, self.guidance, self.replaces)

    def input(self, latent: Tensor) -> Tensor:
        return latent if self.concat is None else torch.cat([latent, self.concat], dim=1)

    def timestep(self, timestep: float) -> Tensor:
        return torch.full((len(self.text),), timestep, device=self.text.device)


class HunyuanConditioner(Conditioner):
    empty_latent = "Use an empty latent of 16 channels, from EmptyHunyuanLatentVideo."
    tensors_read = frozenset({TEXT_MASK})
    numbers_read = frozenset({OWN_GUIDANCE, GUIDING_FRAME})
    cures = {
        "ref_latent": "It comes from HunyuanImageToVideo with the guidance_type custom, for other models. Choose v1 "
        "(concat) for an image-to-video model with 33 in_channels, else v2 (replace).",
        "conditioning_byt5small": "It is of HunyuanVideo 1.5, which is another model. Encode the prompt with the text "
        "encoders of HunyuanVideo (llava_llama3 and clip_l).",
    }

    @property
    def _image_type(self) -> str | None:
        return self.config.get("image_condition_type", EITHER)

    @property
    def embeds_guidance(self) -> bool:
        return filled(self.config)["guidance_embeds"]

    @property
    def sees_known_clean(self) -> bool:
        """As in core ComfyUI, also where only a part of a frame is known."""
        return True

    def read(self, given: Given) -> Given:
        """Without the tokens that a mask excludes."""
        prompts = {name: _without_padding(name, prompt) for name, prompt in given.prompts.items()}
        return replace(given, prompts=prompts)

    def branch(self, prompt: Prompt, given: Given, device: torch.device, dtype: torch.dtype) -> HunyuanBranch:
        text, pooled = (ready(one, given.batch, device, dtype) for one in (prompt.text, prompt.pooled))
        concat = None
        if self._image_type == CONCAT:
            concat = ready(self._concat(prompt, given), given.batch, device, dtype)
        return HunyuanBranch(text, pooled, self._guidance(prompt, given, text), concat, self._replaces(given.prompts))

    def first_frame(self, given: Given) -> Tensor | None:
        prompt = given.prompts["positive"]
        if self._image_type == CONCAT and prompt.concat_latent is not None:
            return self.latents.normalised(prompt.concat_latent[:, :, :1].float())
        return self.latents.normalised(given.latent[:, :, :1].float()) if self._replaces(given.prompts) else None

    def notes(self, given: Given) -> list[str]:
        scales = {name: prompt.numbers.get(OWN_GUIDANCE) for name, prompt in given.prompts.items()}
        return [
            f"The {name} conditioning's guidance ({scale:g}) has no effect, as this model reads none."
            for name, scale in scales.items() if scale is not None and not self.embeds_guidance
        ]  # fmt: skip

    def embedded_guidance(self, prompt: Prompt, given: Given) -> float | None:
        return prompt.numbers.get(OWN_GUIDANCE, given.embedded_guidance) if self.embeds_guidance else None

    def _guidance(self, prompt: Prompt, given: Given, text: Tensor) -> Tensor | None:
        """[B], fp32: the scale times 1000, both in the dtype of the blocks. In bfloat16, 6 becomes 6016: the authors'
        code, diffusers and core ComfyUI embed that number, and another one changes the video."""
        scale = self.embedded_guidance(prompt, given)
        if scale is None:
            return None
        return (torch.full((given.batch,), scale, device=text.device, dtype=text.dtype) * GUIDANCE_UNIT).float()

    def _replaces(self, prompts: Mapping[str, Prompt]) -> bool:
        """Whether the network takes the latent's first frame as clean."""
        guided = any(GUIDING_FRAME in prompt.numbers for prompt in prompts.values())
        return self._image_type == REPLACE or (self._image_type == EITHER and guided)

    def _concat(self, prompt: Prompt, given: Given) -> Tensor:
        """[B or 1, C + 1, T, H, W]: the known video, normalised, and a mask, 1 where it is known.

        Frames that are not given are zeros and unknown. Without an image, the start latent and its noise mask are the
        known video, as in core ComfyUI.
        """
        latent, frames = given.latent, given.latent.shape[2]
        known = latent if prompt.concat_latent is None else prompt.concat_latent
        video = _filled_up(self.latents.normalised(known.float()), frames, 0.0)
        unknown = given.noise_mask if prompt.concat_mask is None else prompt.concat_mask
        if unknown is None:
            unknown = torch.ones(1, 1, *latent.shape[2:])
        mask = 1 - _filled_up(unknown.float().round(), frames, 1.0)
        batch = max(video.shape[0], mask.shape[0])
        return torch.cat([part.expand(batch, -1, -1, -1, -1) for part in (video, mask)], dim=1)

    # For samplers outside of the ranks

    def check_inputs(self, inputs: Inputs) -> None:
        outer.check(filled(self.config), Reads(self.form, self.text_width, self.pooled_width), inputs)

    def outer_branch(self, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> outer.OuterHunyuanBranch:
        return outer.branch_of(filled(self.config), inputs, device, dtype)

    # Checks

    def check(self, given: Given) -> None:
        super().check(given)
        if self._replaces(given.prompts) and (given.noise_mask is None or given.noise_mask[:, :, 0].any()):
            raise ValueError(
                "This model makes a video from its first frame, but the latent does not hold one: its noise_mask must "
                "be 0 in the whole first frame. Connect the latent of the image-to-video node, with v2 (replace) and "
                "a start image."
            )

    def check_prompt(self, name: str, prompt: Prompt, given: Given) -> None:
        self._check_mask(name, prompt)
        self._check_guiding_frame(name, prompt)
        self._check_concat(name, prompt, given.latent)
        if prompt.clip_vision is not None:
            raise ValueError(
                f"The {name} conditioning carries a clip_vision_output, but HunyuanVideo reads an image through its "
                "text encoder. Connect the image to Ascend Text Encode instead."
            )

    def _check_mask(self, name: str, prompt: Prompt) -> None:
        """The tokens that are read must come first, and be as many for each video."""
        mask, text = prompt.tensors.get(TEXT_MASK), prompt.text
        if mask is None:
            return
        cure = "Use the mask that the text encoder made, or none."
        if mask.ndim != 2 or mask.shape[1] != text.shape[1] or mask.shape[0] not in (1, text.shape[0]):
            raise ValueError(
                f"The {name} conditioning's {TEXT_MASK} has the shape {list(mask.shape)}; for its text it must be "
                f"{[text.shape[0], text.shape[1]]}. {cure}"
            )
        read = mask != 0
        lengths = read.sum(1)
        if not lengths.all() or not torch.equal(read, torch.arange(mask.shape[1]) < lengths[:, None]):
            raise ValueError(
                f"The {name} conditioning's {TEXT_MASK} excludes tokens before others, or all; HunyuanVideo reads "
                f"all tokens up to the end of a text. {cure}"
            )
        if (lengths != lengths[0]).any():
            raise ValueError(
                f"The {name} conditioning has prompts of {', '.join(map(str, lengths.tolist()))} tokens; the prompts "
                "of one job must be equally long. Sample these videos one by one."
            )

    def _check_guiding_frame(self, name: str, prompt: Prompt) -> None:
        frame = prompt.numbers.get(GUIDING_FRAME)
        if frame is None:
            return
        carried = f"The {name} conditioning carries {GUIDING_FRAME}, which replaces a frame (v2)"
        if self._image_type == CONCAT:
            raise ValueError(f"{carried}, but this model reads 33 channels. Choose v1 (concat) as guidance_type.")
        if self._image_type is None:
            raise ValueError(
                f"{carried}, but this model's config says that it is a text-to-video model. Use the image-to-video "
                "model of v2, or connect the prompt's conditioning directly."
            )
        if frame != 0:
            raise ValueError(f"{carried}: {frame:g}. Only the first frame, 0, can be given.")

    def _check_concat(self, name: str, prompt: Prompt, latent: Tensor) -> None:
        parts = {"concat_latent": prompt.concat_latent, "concat_mask": prompt.concat_mask}
        parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if parts and self._image_type != CONCAT:
            raise ValueError(
                f"The {name} conditioning carries an image ({' and '.join(parts)}), but this model has no input for "
                "it. Use the image-to-video model that reads 33 channels, or choose v2 (replace) for the one that "
                "reads 16, or connect the prompt's conditioning directly."
            )
        for part, tensor in parts.items():
            channels = 1 if part == "concat_mask" else latent.shape[1]
            _check_known(f"{name} conditioning's {part}", tensor, latent, channels)


def _without_padding(name: str, prompt: Prompt) -> Prompt:
    """`prompt` without the tokens that its mask excludes, and without the mask. Text of no token is never attended, so
    leaving it out is exact."""
    mask = prompt.tensors.get(TEXT_MASK)
    if mask is None:
        return prompt
    tensors = {entry: tensor for entry, tensor in prompt.tensors.items() if entry != TEXT_MASK}
    return structs.replace(prompt, text=prompt.text[:, : int((mask[0] != 0).sum())], tensors=tensors)


def _filled_up(video: Tensor, frames: int, value: float) -> Tensor:
    """A video [B, C, T, H, W] with frames of this value behind it."""
    return F.pad(video, (0, 0, 0, 0, 0, frames - video.shape[2]), value=value)


def _check_known(name: str, tensor: Tensor, latent: Tensor, channels: int) -> None:
    """Raises ValueError for a tensor that is not [B or 1, channels, T' <= T, H, W], with the sizes of `latent`."""
    batch, _, frames, *plane = latent.shape
    shape = list(tensor.shape)
    if tensor.ndim != 5 or shape[0] not in (1, batch) or shape[1] != channels or shape[3:] != plane or (
        not 1 <= shape[2] <= frames
    ):
        raise ValueError(
            f"The {name} has the shape {shape}; with this latent and this model it must be [1"
            f"{f' or {batch}' if batch > 1 else ''}, {channels}, 1 to {frames} frames, {plane[0]}, {plane[1]}]. Make "
            "the image conditioning and the latent with the same node, and with the model's VAE."
        )
    check_finite(tensor, f"The {name}")
