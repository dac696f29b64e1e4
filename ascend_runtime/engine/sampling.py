"""Sigmas, solvers and the denoise loop of flow matching. Independent of ranks and devices.

The solvers are diffusers' schedulers. They run on the CPU in fp32, which costs little and gives the same result for
every device and number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Callable, ContextManager, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ..models.family import Family
from ..specs import SampleSpec
from ..specs.jobs import SIMPLE

TRAIN_TIMESTEPS = 1000
IMAGE_SHARE = 0.001  # of the image in the noise (hyvideo/diffusion/pipelines of HunyuanVideo-I2V; diffusers)
_ORDERS = "lower_order_nums", "this_order"  # attributes of schedulers that take several steps into account
_NEARLY_ONE = 1 - 1e-6  # the multistep solvers compute log(1 - sigma)


def noise_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise of a seed, drawn on the CPU, so that a video does not depend on the device or the number of ranks."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def simple_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Sigmas of core ComfyUI's schedule "simple": every (1000/steps)-th of 1000 shifted sigmas, then 0."""
    times = torch.arange(1, TRAIN_TIMESTEPS + 1) / TRAIN_TIMESTEPS
    table = shift * times / (1 + (shift - 1) * times)
    stride = TRAIN_TIMESTEPS / steps
    return tuple(float(table[-(1 + int(i * stride))]) for i in range(steps)) + (0.0,)


def make_scheduler(spec: SampleSpec, family: Family):
    """diffusers' scheduler for the solver, with its timesteps set, at the job's first step.

    Sigmas come from the spec, from its schedule or from the family. If the family gives none, the scheduler computes
    them, as in diffusers' pipeline. A run that is ended early goes down to sigma 0 in its last step.
    """
    given = spec.sigmas or _sigmas(spec, family)
    scheduler = _solver(spec.solver, spec.shift)
    scheduler.set_timesteps(len(given) - 1 if given else spec.steps, device="cpu")
    if given:
        scheduler.timesteps = torch.tensor(given[:-1]) * TRAIN_TIMESTEPS
        top = 1.0 if spec.solver == "euler" else _NEARLY_ONE
        scheduler.sigmas = torch.tensor(given).clamp(max=top)
    if spec.ends_at < spec.total_steps:
        scheduler.timesteps = scheduler.timesteps[: spec.ends_at]
        scheduler.sigmas = torch.cat((scheduler.sigmas[: spec.ends_at], torch.zeros(1)))
    scheduler.set_begin_index(spec.start_step)
    return scheduler


def _sigmas(spec: SampleSpec, family: Family) -> tuple[float, ...] | None:
    if spec.schedule == SIMPLE:
        return simple_sigmas(spec.steps, spec.shift)
    return family.sigmas(spec.steps, spec.shift, spec.solver)


def schedule_of(spec: SampleSpec, family: Family) -> list[float]:
    """The timestep of each step of the run, in 0..1000."""
    return list(map(float, make_scheduler(spec, family).timesteps))


def _solver(name: str, shift: float):
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return UniPCMultistepScheduler(**flow) if name == "unipc" else DPMSolverMultistepScheduler(**flow)


@dataclass(frozen=True)
class Known:
    """The known part of a video, which sampling does not change.

    latent [B,C,T,H,W]: normalised. unknown [B,1,T,H,W]: 1 where the latent is generated, 0 where it is known, or
    between. noise: added to the known part at the current sigma; None if the network sees it clean.
    """

    latent: Tensor
    unknown: Tensor
    noise: Tensor | None

    def into(self, latent: Tensor, sigma: float = 0.0) -> Tensor:
        """`latent` with the known part inserted, with the noise of `sigma`."""
        known = self.latent
        if self.noise is not None:
            known = sigma * self.noise + (1 - sigma) * known
        return latent * self.unknown + known * (1 - self.unknown)


class SolverStep(NamedTuple):
    """number: in the run, counted from 0. following: the next step's timestep, or None in the job's last step."""

    number: int
    following: float | None


class Watch:
    """Callbacks of the denoise loop, which do nothing by default."""

    def around(self, step: int) -> ContextManager:
        """The context of a step of the job, counted from 1, including its call of `stepped`."""
        return nullcontext()

    def stepped(self, step: int, total: int, latent: Tensor, x0: Tensor) -> None:
        """Called after each step of the job. latent [B,C,T,H,W]: that of the next step. x0 [B,C,T,H,W]: this step's x0
        prediction. Both are normalised."""


VelocityAt = Callable[[Tensor, float, SolverStep], Tensor]  # (latent, timestep in 0..1000, step) -> velocity; fp32, CPU


def denoise(
    velocity: VelocityAt, scheduler, start: Tensor, known: Known | None = None, watch: Watch = Watch()
) -> Tensor:
    """Runs the denoise loop over all steps of a run and returns the latent [B,C,T,H,W], as `handed_on` does."""
    x = stepped_through(velocity, scheduler, start, range(len(scheduler.timesteps)), known, watch)
    return handed_on(x, float(scheduler.sigmas[-1]), known)


def stepped_through(
    velocity: VelocityAt, scheduler, start: Tensor, steps: range, known: Known | None = None, watch: Watch = Watch()
) -> Tensor:
    """Runs some steps of the denoise loop and returns the noisy latent [B,C,T,H,W] after them, in fp32, normalised, on
    the CPU.

    scheduler: from `make_scheduler`. start: the noisy latent. known: inserted into the latent before each pass, and
    into each x0 prediction.
    """
    x, sigmas = start, scheduler.sigmas
    timesteps = list(map(float, scheduler.timesteps))
    for number, step in enumerate(steps, 1):
        with watch.around(number):
            sigma = float(sigmas[step])
            seen = x if known is None else known.into(x, sigma)
            following = timesteps[step + 1] if number < len(steps) else None
            direction = velocity(seen, timesteps[step], SolverStep(step, following))
            x0 = seen - sigma * direction
            if known is not None:
                x0 = known.into(x0)
                direction = (x - x0) / sigma
            x = scheduler.step(direction, scheduler.timesteps[step], x, return_dict=False)[0]
            watch.stepped(number, len(steps), x, x0)
    return x


def handed_on(latent: Tensor, sigma: float, known: Known | None = None) -> Tensor:
    """The latent [B,C,T,H,W] after the last step, at the scale that core ComfyUI's next sampler expects: with noise of
    `sigma`, it is divided by 1 - sigma. What is known has no noise, so that the next sampler knows it too."""
    scaled = latent / (1 - sigma)
    return scaled if known is None or not sigma else known.into(scaled)


def noisy(latent: Tensor, spec: SampleSpec, image: Tensor | None = None, sigma: float | None = None) -> Tensor:
    """The noisy latent [B,C,T,H,W] of the first step. latent: normalised, or zeros for a new video. image [B or
    1,C,1,H,W]: a little of it is in the noise of every frame; None: the noise is pure. sigma: of the first step, if it
    is not the run's first."""
    start = sigma or (spec.sigmas[0] if spec.sigmas else 1.0)  # schedules begin at pure noise
    if not spec.add_noise:
        return (1 - start) * latent
    noise = noise_of(latent.shape, spec.seed)
    if image is not None:
        noise = (1 - IMAGE_SHARE) * noise + IMAGE_SHARE * image
    return start * noise + (1 - start) * latent



def history_of(solver: str, scheduler, latent: Tensor, step: int) -> dict[str, Tensor]:
    """What a job that goes on at `step` needs to compute exactly what this one would: the noisy latent [B,C,T,H,W], and
    what a multistep solver keeps of earlier steps. The result of a job has only the latent; a solver that gets no more
    begins again, as all of core ComfyUI's do."""
    kept = {f"output {place}": one for place, one in enumerate(getattr(scheduler, "model_outputs", ()))}
    kept |= {"last sample": getattr(scheduler, "last_sample", None)}
    orders = torch.tensor([getattr(scheduler, name, 0) for name in _ORDERS])
    kept |= {"latent": latent, "sigmas": scheduler.sigmas[: step + 1].clone(), f"orders of {solver}": orders}
    return {name: one for name, one in kept.items() if one is not None}


def resumed(
    history: Mapping[str, Tensor], solver: str, scheduler, shape: tuple[int, ...], step: int
) -> Tensor | None:
    """Sets the scheduler up with what `history_of` has kept, and returns the noisy latent. None, and no change, for
    what was kept of another solver, size, step or schedule, or for nothing."""
    orders, sigmas = history.get(f"orders of {solver}"), history.get("sigmas")
    fitting = {name: one for name, one in history.items() if one.shape == shape and one.dtype == torch.float32}
    if "latent" not in fitting or orders is None or orders.shape != (len(_ORDERS),) or sigmas is None:
        return None
    if not torch.equal(sigmas, scheduler.sigmas[: step + 1]):
        return None
    if solver == "euler":
        return fitting["latent"]
    outputs = [fitting.get(f"output {place}") for place in range(len(scheduler.model_outputs))]
    if sum(one is not None for one in outputs) < min(int(orders[0]), len(outputs)):
        return None
    vars(scheduler).update(zip(_ORDERS, orders.tolist()), model_outputs=outputs, last_sample=fitting.get("last sample"))
    return fitting["latent"]
