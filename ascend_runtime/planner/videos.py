"""The video that a job makes, as the planner sees it."""

from __future__ import annotations

from dataclasses import replace

from ..specs import AccelerationSpec, SampleSpec, VideoSize
from .facts import Model, Video


def video_of(
    model: Model,
    size: VideoSize,
    sample: SampleSpec = SampleSpec(),
    acceleration: AccelerationSpec = AccelerationSpec(),
    from_image: bool = False,
) -> Video:
    """A video of this size. sample: what it leaves open is the model's own. from_image: whether an image or frames of
    the video are known."""
    shape = model.family.form(model.experts[0].config).latent_shape(size)
    return of_latent(model, shape, sample, acceleration, from_image)


def of_latent(
    model: Model, shape: tuple[int, int, int, int, int], sample: SampleSpec, acceleration: AccelerationSpec,
    from_image: bool,
) -> Video:  # fmt: skip
    """As `video_of`, of a latent [B,C,T,H,W] of this shape."""
    config, (_, _, _, height, width) = model.experts[0].config, shape
    spec = model.defaults.fill(sample, model.family.form(config).spatial ** 2 * height * width)
    return Video(
        shape=shape,
        passes=tuple(passes_of(model, spec)),
        text_tokens=model.family.text_tokens,
        per_token=from_image and model.family.per_token(config),
        acceleration=acceleration,
        part=(spec.computed_steps.start, spec.computed_steps.stop),
    )


def resized(model: Model, video: Video, size: VideoSize) -> Video:
    """The same video in another size."""
    form = model.family.form(model.experts[0].config)
    return replace(video, shape=(video.shape[0], *form.latent_shape(size)[1:]))


def passes_of(model: Model, spec: SampleSpec) -> list[tuple[int, int]]:
    """(the number of the expert, the number of guidance branches) of each step of the run. spec: without None."""
    from .timing.schedules import TIMESTEPS, timesteps_of  # numpy takes a while, and is not needed to ask for help

    boundary = (model.defaults.boundary or 0.0) * TIMESTEPS if len(model.experts) == 2 else 0.0
    experts = [int(timestep < boundary) for timestep in timesteps_of(spec, model.family)]
    scales = spec.guidance_scale, spec.low_noise_guidance
    return [(expert, 1 if scales[expert] == 1.0 else 2) for expert in experts]
