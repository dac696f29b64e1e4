"""The video that a job makes, as the planner sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..models.family import Family
from ..specs import AccelerationSpec, SampleSpec, VideoSize
from ..specs.jobs import SIMPLE
from .facts import Model, Video

TIMESTEPS = 1000  # of training


def video_of(
    model: Model,
    size: VideoSize,
    sample: SampleSpec = SampleSpec(),
    acceleration: AccelerationSpec = AccelerationSpec(),
    from_image: bool = False,
) -> Video:
    """A video of this size. sample: what it leaves open is the model's own. from_image: whether an image or frames of
    the video are known."""
    config = model.experts[0].config
    spec = model.defaults.fill(sample, size.width * size.height)
    return Video(
        shape=model.family.form(config).latent_shape(size),
        passes=tuple(passes_of(model, spec)),
        text_tokens=model.family.text_tokens,
        per_token=from_image and model.family.per_token(config),
        acceleration=acceleration,
    )


def resized(model: Model, video: Video, size: VideoSize) -> Video:
    """The same video in another size."""
    form = model.family.form(model.experts[0].config)
    return replace(video, shape=(video.shape[0], *form.latent_shape(size)[1:]))


def passes_of(model: Model, spec: SampleSpec) -> list[tuple[int, int]]:
    """(the number of the expert, the number of guidance branches) of each step. spec: without None."""
    boundary = (model.defaults.boundary or 0.0) * TIMESTEPS if len(model.experts) == 2 else 0.0
    experts = [int(timestep < boundary) for timestep in timesteps_of(spec, model.family)]
    scales = spec.guidance_scale, spec.low_noise_guidance
    return [(expert, 1 if scales[expert] == 1.0 else 2) for expert in experts]


def timesteps_of(spec: SampleSpec, family: Family) -> list[float]:
    """The timestep of each step, in 0..1000, as the schedulers of `engine.sampling` have them."""
    given = spec.sigmas
    if given is None:
        simple = spec.schedule == SIMPLE
        given = _simple(spec.steps, spec.shift) if simple else family.sigmas(spec.steps, spec.shift, spec.solver)
    if given is not None:
        return (TIMESTEPS * np.asarray(given[:-1], dtype=np.float32)).tolist()
    if spec.solver == "euler":
        return (TIMESTEPS * _euler(spec.steps, spec.shift)).tolist()
    return np.floor(TIMESTEPS * _multistep(spec.solver, spec.steps, spec.shift)).tolist()


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _simple(steps: int, shift: float) -> np.ndarray:
    """Every (1000 / steps)-th of 1000 shifted sigmas, then 0."""
    table = _shifted(np.arange(1, TIMESTEPS + 1, dtype=np.float32) / np.float32(TIMESTEPS), np.float32(shift))
    stride = TIMESTEPS / steps
    return np.append(table[[-(1 + int(step * stride)) for step in range(steps)]], np.float32(0))


def _euler(steps: int, shift: float) -> np.ndarray:
    """Of diffusers' FlowMatchEulerDiscreteScheduler, which shifts its lowest sigma twice."""
    return _shifted(np.linspace(1, _shifted(np.float64(1 / TIMESTEPS), shift), steps), shift)


def _multistep(solver: str, steps: int, shift: float) -> np.ndarray:
    """Of diffusers' UniPCMultistepScheduler and DPMSolverMultistepScheduler with flow sigmas, whose timesteps are
    whole numbers."""
    if solver == "unipc":
        return np.minimum(_shifted(np.linspace(1, 1 / TIMESTEPS, steps + 1)[:-1], shift), 1 - 1e-6)
    return _shifted(np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1)[:-1], shift)
