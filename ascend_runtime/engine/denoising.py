"""The denoise loop of a job: guidance, known frames, and the work after each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ContextManager, NamedTuple

from torch import Tensor

from ..components import DiffusionModel
from ..errors import coded
from ..models.shared.conditioning import Given
from ..ops.finite import is_finite
from ..parallel.cfg import guided
from .generation import Generation, NetworkCall, Request
from .guard.diagnosis import Diagnosis, Evaluation, cure_of
from .profiling import Recorder
from .sampling import (
    Known,
    SolverStep,
    Watch,
    handed_on,
    history_of,
    make_scheduler,
    noise_of,
    noisy,
    resumed,
    stepped_through,
)

STILL = 1e-3  # of a latent's standard deviation: what its frames may differ by and be the same


class Denoised(NamedTuple):
    """latent [B,C,T,H,W]: not normalised, on the CPU. history: for a job that goes on with its leftover noise.
    continued: whether the job went on with the history of another."""

    latent: Tensor
    history: dict[str, Tensor]
    continued: bool


def denoised(generation: Generation, model: DiffusionModel, request: Request, watch: StepsOfJob) -> Denoised:
    """Runs the job's part of the denoise loop."""
    spec, steps = request.spec, request.spec.computed_steps
    scheduler = make_scheduler(spec, model.family)
    latent = _start(request.given.latent, model)
    known = _known(request, latent, model)
    start = resumed(request.history, spec.solver, scheduler, latent.shape, steps.start)
    continued = start is not None
    if not continued:
        sigma = float(scheduler.sigmas[steps.start]) if steps.start else None
        start = noisy(latent, spec, _image(request, model), sigma)
    try:
        velocity = Guided(generation, model, request)
        watch.begin(velocity, steps.start)
        end = stepped_through(velocity, scheduler, start, steps, known, watch)
    finally:
        generation.finish()
    sigma = float(scheduler.sigmas[steps.stop])
    history = history_of(spec.solver, scheduler, end, steps.stop) if spec.leftover_noise and sigma else {}
    return Denoised(model.latents.restored(handed_on(end, sigma, known)), history, continued)


@dataclass
class Guided:
    """The velocity for the solver: the cond branch's, or with classifier-free guidance by both branches. last: the
    passes of the last step."""

    generation: Generation
    model: DiffusionModel
    request: Request
    last: Evaluation | None = None

    def __call__(self, latent: Tensor, timestep: float, step: SolverStep) -> Tensor:
        """latent and result are [B,C,T,H,W] in fp32 on the CPU."""
        spec, contexts = self.request.spec, self.generation.contexts
        low_noise = self.model.is_low_noise(timestep)
        scale = spec.low_noise_guidance if low_noise else spec.guidance_scale
        branches = ("cond",) if scale == 1.0 else ("cond", "uncond")
        calls = [NetworkCall(branch, latent, timestep, contexts[branch]) for branch in branches]
        velocities = self.generation.velocity(calls, step)
        self.last = Evaluation(calls, step, velocities)
        velocity = velocities[0] if scale == 1.0 else guided(*velocities, scale)
        return velocity.float().cpu()

    def fault(self, total: int) -> ValueError:
        """Why the last of `total` steps has led to values that are not finite. Collective."""
        return Diagnosis(self.generation, self.model, self.last, together=True).error(total)


class StepsOfJob(Watch):
    """Reports progress and previews, checks for a cancel and for values that are not finite, and profiles steps.

    A warm-up's values are nobody's, and may be what no job meets.
    """

    def __init__(
        self, job, model: DiffusionModel, generation: Generation, recorder: Recorder | None = None, stage="denoise"
    ):
        self._job, self._latents, self._tally = job, model.latents, generation.acceleration.tally
        self._recorder, self._stage = recorder, stage
        self._previews = job.message.preview and stage == "denoise" and self._latents.has_picture

    def begin(self, velocity: Guided, step: int) -> None:
        """step: the first that the job computes, counted from 0."""
        self._velocity = velocity
        self._job.check_together()
        self._tally.start(step)

    def around(self, step: int) -> ContextManager:
        return super().around(step) if self._recorder is None else self._recorder.step(step)

    def stepped(self, step: int, total: int, latent: Tensor, x0: Tensor) -> None:
        self._tally.stepped()
        self._job.progress(self._stage, step, total)
        if self._previews:
            self._job.preview(step, total, self._latents.picture(x0))
        if self._job.check_together(self._stage == "denoise" and not is_finite(latent)):
            raise self._velocity.fault(total)


def standing_still(latent: Tensor, request: Request) -> list[str]:
    """A warning if all frames of a made latent [B,C,T,H,W] are the same, though each began with noise of its own. What
    is known of a video, and kept, may be so."""
    mask = request.given.noise_mask
    if latent.shape[2] == 1 or mask is not None and not mask.any():
        return []
    first, limit = latent[:, :, 0], STILL * latent.std()
    if any(bool((frame - first).abs().max() > limit) for frame in latent.flip(2).unbind(2)[:-1]):
        return []
    kinds = request.acceleration.kinds
    cure = cure_of(kinds) if kinds else "Check the model's files, the LoRAs' strength and the dtype."
    return [coded("AV-1609", f"All {latent.shape[2]} frames of the latent are the same. {cure}")]


def _start(latent: Tensor, model: DiffusionModel) -> Tensor:
    """The start latent, normalised. An empty one (all zeros) is not changed."""
    start = latent.float()
    return model.latents.normalised(start) if start.any() else start


def _image(request: Request, model: DiffusionModel) -> Tensor | None:
    """What is mixed into the noise of all frames, if the job asks for it."""
    return model.conditioner.first_frame(request.given) if request.spec.image_start else None


def _known(request: Request, start: Tensor, model: DiffusionModel) -> Known | None:
    """The known part of the video, or None if there is none."""
    given: Given = request.given
    if given.noise_mask is None:
        return None
    noise = None if model.conditioner.sees_known_clean else noise_of(start.shape, request.spec.seed)
    return Known(start, given.noise_mask.float().expand(given.batch, -1, -1, -1, -1), noise)
