"""Sigmas, solvers and the denoise loop of flow matching. Knows nothing of ranks and devices.

The solvers are diffusers' schedulers. Their arithmetic is small and stays on the CPU in fp32, where it is the same
for every device and number of ranks.
"""

from __future__ import annotations

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
_NEARLY_ONE = 1 - 1e-6  # the multistep solvers take log(1 - sigma)


def noise_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise of a seed, drawn whole on the CPU, so that a video does not depend on the device or the ranks."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def simple_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Sigmas of core ComfyUI's schedule "simple": every (1000/steps)-th of 1000 shifted sigmas, then 0."""
    times = torch.arange(1, TRAIN_TIMESTEPS + 1) / TRAIN_TIMESTEPS
    table = shift * times / (1 + (shift - 1) * times)
    stride = TRAIN_TIMESTEPS / steps
    return tuple(float(table[-(1 + int(i * stride))]) for i in range(steps)) + (0.0,)


def make_scheduler(spec: SampleSpec, family: Family):
    """diffusers' scheduler for the solver, its timesteps set.

    With the family's own schedule and none that it states, the scheduler chooses its sigmas, as it does in diffusers'
    pipeline; otherwise they are given.
    """
    given = spec.sigmas or _sigmas(spec, family)
    scheduler = _solver(spec.solver, spec.shift)
    scheduler.set_timesteps(len(given) - 1 if given else spec.steps, device="cpu")
    if given:
        scheduler.timesteps = torch.tensor(given[:-1]) * TRAIN_TIMESTEPS
        top = 1.0 if spec.solver == "euler" else _NEARLY_ONE
        scheduler.sigmas = torch.tensor(given).clamp(max=top)
    scheduler.set_begin_index(0)
    return scheduler


def _sigmas(spec: SampleSpec, family: Family) -> tuple[float, ...] | None:
    if spec.schedule == SIMPLE:
        return simple_sigmas(spec.steps, spec.shift)
    return family.sigmas(spec.steps, spec.shift, spec.solver)


def schedule_of(spec: SampleSpec, family: Family) -> list[float]:
    """The timestep of each step, in 0..1000."""
    return list(map(float, make_scheduler(spec, family).timesteps))


def _solver(name: str, shift: float):
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return UniPCMultistepScheduler(**flow) if name == "unipc" else DPMSolverMultistepScheduler(**flow)


@dataclass(frozen=True)
class Known:
    """What of a video is given and stays.

    latent [B,C,T,H,W], normalised; unknown [B,1,T,H,W]: 1 where it is to be made, 0 where it is known, or between.
    noise: what the network sees the known part under, as much as of the rest; None: it sees it clean.
    """

    latent: Tensor
    unknown: Tensor
    noise: Tensor | None

    def into(self, latent: Tensor, sigma: float = 0.0) -> Tensor:
        """`latent` with the known part in its place, as noisy as the network is to see it at `sigma`."""
        known = self.latent
        if self.noise is not None:
            known = sigma * self.noise + (1 - sigma) * known
        return latent * self.unknown + known * (1 - self.unknown)


class Step(NamedTuple):
    """number: from 0. following: the next step's timestep, None after the last."""

    number: int
    following: float | None


class Watch:
    """What the denoise loop calls; nothing by default."""

    def around(self, step: int) -> ContextManager:
        """The context of step number 1, 2 ..., `stepped` included."""
        return nullcontext()

    def stepped(self, step: int, total: int, x0: Tensor) -> None:
        """After each step. x0 [B,C,T,H,W]: the clean latent as this step predicts it, normalised."""


Velocity = Callable[[Tensor, float, Step], Tensor]  # of a latent at a timestep in 0..1000, all on the CPU in fp32


def denoise(
    velocity: Velocity, scheduler, start: Tensor, known: Known | None = None, watch: Watch = Watch()
) -> Tensor:
    """The denoised latent [B,C,T,H,W] in fp32, normalised, on the CPU.

    scheduler: as `make_scheduler` makes it. start: the noisy latent. known: what is put into each latent of which the
    velocity is computed, and into what becomes of it.
    """
    x, sigmas, total = start, scheduler.sigmas, len(scheduler.timesteps)
    timesteps = [*map(float, scheduler.timesteps), None]
    for step, timestep in enumerate(scheduler.timesteps):
        with watch.around(step + 1):
            sigma = float(sigmas[step])
            seen = x if known is None else known.into(x, sigma)
            direction = velocity(seen, timesteps[step], Step(step, timesteps[step + 1]))
            x0 = seen - sigma * direction
            if known is not None:
                x0 = known.into(x0)
                direction = (x - x0) / sigma
            x = scheduler.step(direction, timestep, x, return_dict=False)[0]
            watch.stepped(step + 1, total, x0)
    return x / (1 - float(sigmas[-1]))  # of a schedule cut short, as core ComfyUI hands it to the next sampler


def noisy(latent: Tensor, spec: SampleSpec) -> Tensor:
    """The latent [B,C,T,H,W] that the first step begins with, of a normalised one (zeros where there is none)."""
    start = spec.sigmas[0] if spec.sigmas else 1.0  # schedules begin at pure noise
    return start * noise_of(latent.shape, spec.seed) + (1 - start) * latent
