"""Images to CONDITIONING and LATENT for an image-to-video model."""

from __future__ import annotations

from collections.abc import Mapping

import node_helpers
import torch
from comfy.clip_vision import Output
from comfy_api.latest import io
from torch import Tensor

from ..ascend_runtime.models.image_forms import ImageForm
from ..ascend_runtime.models.registry import family
from ..ascend_runtime.specs import VaeForm, VideoSize
from ..ascend_runtime.specs.base import require_side
from . import comfy_bridge, core_types, types
from .page.schema import CONDITIONING, FAMILIES, Schema
from .page.validation import refusal

GUIDANCE_TYPES = ("v1 (concat)", "v2 (replace)")  # as core's HunyuanImageToVideo names them


def sides() -> list[io.Input]:
    """The inputs for the width and the height of a video."""
    return [
        io.Int.Input(
            name,
            default=default,
            min=16,
            max=8192,
            step=16,
            tooltip=f"The {name} of the video in pixels: a multiple of 16, or of 32 for Wan2.2-TI2V-5B.",
        )
        for name, default in (("width", 832), ("height", 480))
    ]


class ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendImageToVideo",
            display_name="Ascend Image To Video",
            category=CONDITIONING,
            search_aliases=[
                *FAMILIES, "image to video i2v", "start image", "first frame", "first last frame flf2v", "图生视频",
            ],
            advanced=("guidance_type",),
            description="Prepares a video that starts with an image, ends with another image, or both.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                types.Vae.Input("vae", tooltip="From Ascend Load VAE. It must be the VAE of the model."),
                *sides(),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=8193,
                    step=4,
                    optional=True,
                    tooltip="The number of frames: 4n+1, such as 81.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="The number of videos that are made at once.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the video should not show. Not needed if cfg is 1."
                ),
                io.Image.Input("start_image", optional=True, tooltip="The first frame, or the first few frames."),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="The last frame, or the last few frames. Not for Wan2.2-TI2V-5B or HunyuanVideo.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="From core's CLIP Vision Encode, for start_image. Only Wan 2.1 models need it.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_end_output",
                    optional=True,
                    tooltip="From core's CLIP Vision Encode, for end_image. Only Wan 2.1 FLF2V needs it, the "
                    "model for a first and a last frame.",
                ),
                io.Combo.Input(
                    "guidance_type",
                    options=list(GUIDANCE_TYPES),
                    default=GUIDANCE_TYPES[0],
                    optional=True,
                    tooltip="Only for HunyuanVideo: how its two image-to-video models take the image.\n"
                    "v1 (concat): next to the noise, for the model with 33 channels.\n"
                    "v2 (replace): as the first frame of the latent, which stays as it is.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The input with the images added, for Ascend Sampler."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The input with the images added. Empty if no negative input is connected.",
                ),
                io.Latent.Output(display_name="latent", tooltip="A latent of the video's size, for Ascend Sampler."),
            ],
        )

    @classmethod
    def validate_inputs(cls, width, height, length=81) -> bool | str:
        return refusal(_video_size, width, height, length)

    @classmethod
    def execute(
        cls,
        positive,
        vae,
        width,
        height,
        length=81,
        batch_size=1,
        negative=None,
        start_image=None,
        end_image=None,
        clip_vision_output=None,
        clip_vision_end_output=None,
        guidance_type=GUIDANCE_TYPES[0],
    ) -> io.NodeOutput:
        form = comfy_bridge.vae_form(vae)
        size = _size(width, height, length, form)
        images = {"start_image": start_image, "end_image": end_image}
        start, end = (image if image is None else core_types.pixels_of(image, name, width, height)
                      for name, image in images.items())  # fmt: skip
        clip = core_types.joined(clip_vision_output, clip_vision_end_output)
        way = _chosen(family(form.family).image_forms(form), guidance_type)
        _check(way, end, clip)
        values = {} if clip is None else {"clip_vision_output": clip}
        latent = {"samples": torch.zeros(batch_size, *form.latent_shape(size)[1:])}
        if start is not None or end is not None:
            values |= way.numbers
            if way.in_latent:
                latent = _latent_with_start(vae, form, size, batch_size, start)
            else:
                values |= (_known_video if way.whole else _known_start)(vae, form, size, start, end)
        positive, negative = (one and node_helpers.conditioning_set_values(one, values) for one in (positive, negative))
        return io.NodeOutput(positive, negative, latent)


def _chosen(forms: Mapping[str, ImageForm], guidance_type: str) -> ImageForm:
    """The way to condition on images; models with only one way have no use for `guidance_type`."""
    if len(forms) == 1:
        return next(iter(forms.values()))
    if guidance_type not in forms:
        raise ValueError(f"guidance_type is {guidance_type!r}; with this VAE it can be one of {', '.join(forms)}.")
    return forms[guidance_type]


def _check(way: ImageForm, end: Tensor | None, clip: Output | None) -> None:
    """Raises ValueError for images that the models do not take."""
    if not way.takes_more and (end is not None or clip is not None):
        raise ValueError(
            f"{way.models} take only a start_image. Disconnect end_image, clip_vision_output and "
            "clip_vision_end_output, or use another model and its VAE."
        )


def _size(width: int, height: int, length: int, form: VaeForm) -> VideoSize:
    """Raises ValueError if the networks cannot cut the latent of this size into patches."""
    for name, pixels in (("width", width), ("height", height)):
        require_side(f"{name} is {pixels}; with this VAE", pixels, form.multiple)
    return _video_size(width, height, length)


def _video_size(width: int, height: int, length: int) -> VideoSize:
    return VideoSize(width=width, height=height, num_frames=length)


def _latent_with_start(vae, form: VaeForm, size: VideoSize, batch: int, start: Tensor) -> dict:
    """A LATENT with the start image, marked in its noise_mask; as core's Wan22ImageToVideoLatent and
    HunyuanImageToVideo make it."""
    shape, known = form.latent_shape(size), _encoded_start(vae, form, size, start)
    samples, mask = family(form.family).empty_latent(shape), torch.ones(1, 1, *shape[2:])
    samples[:, :, : known.shape[2]] = known
    mask[:, :, : known.shape[2]] = 0
    return {"samples": samples.repeat(batch, 1, 1, 1, 1), "noise_mask": mask.repeat(batch, 1, 1, 1, 1)}


def _known_start(vae, form: VaeForm, size: VideoSize, start: Tensor, _: None) -> dict:
    """The first latent frames, which the model reads next to the noise; as core's HunyuanImageToVideo makes them."""
    _, _, *sizes = form.latent_shape(size)
    known, mask = _encoded_start(vae, form, size, start), torch.ones(1, 1, *sizes)
    mask[:, :, : known.shape[2]] = 0
    return {"concat_latent_image": known, "concat_mask": mask}


def _known_video(vae, form: VaeForm, size: VideoSize, start: Tensor | None, end: Tensor | None) -> dict:
    """The images that the model reads next to the noise; as core's WanImageToVideo makes them, or with an end as its
    WanFirstLastFrameToVideo does."""
    _, _, frames, height, width = form.latent_shape(size)
    video = torch.full((size.num_frames, size.height, size.width, 3), 0.5)
    each = form.temporal  # frames of a latent frame; as many for the first in a mask
    mask = torch.ones(1, 1, frames * each, height, width)
    if start is not None:
        start = start[: size.num_frames]
        video[: len(start)] = start
        # Without an end, core marks only whole latent frames.
        mask[:, :, : len(start) + each - 1 if end is not None else (len(start) - 1) // each * each + each] = 0
    if end is not None:
        end = end[-size.num_frames :]
        video[-len(end) :] = end
        mask[:, :, -len(end) :] = 0
    mask = mask.unflatten(2, (-1, each))[:, 0].movedim(2, 1)
    return {"concat_latent_image": _encoded(vae, video), "concat_mask": mask}


def _encoded_start(vae, form: VaeForm, size: VideoSize, start: Tensor) -> Tensor:
    """The latent of the first frames, as many as make whole latent frames."""
    count = (min(len(start), size.num_frames) - 1) // form.temporal * form.temporal + 1
    return _encoded(vae, start[:count])


def _encoded(vae, frames: Tensor) -> Tensor:
    return comfy_bridge.run_job(
        vae.ranks, lambda runtime, hooks: runtime.encode_video(vae.spec, frames, **hooks)
    ).tensor
