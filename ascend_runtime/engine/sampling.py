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

from ..specs import SampleSpec

TRAIN_TIMESTEPS = 1000
_NEARLY_ONE = 1 - 1e-6  # the multistep solvers take log(1 - sigma)


def noise_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise of a seed, drawn whole on the CPU, so that a video does not hang on the device or the ranks."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def simple_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Sigmas of core ComfyUI's schedule "simple": every (1000/steps)-th of 1000 shifted sigmas, then 0."""
    times = torch.arange(1, TRAIN_TIMESTEPS + 1) / TRAIN_TIMESTEPS
    table = shift * times / (1 + (shift - 1) * times)
    stride = TRAIN_TIMESTEPS / steps
    return tuple(float(table[-(1 + int(i * stride))]) for i in range(steps)) + (0.0,)


def make_scheduler(spec: SampleSpec):
    """diffusers' scheduler for the solver, its timesteps set.

    With schedule "wan" the scheduler chooses its sigmas, as it does in diffusers' pipeline; otherwise they are given.
    """
    given = spec.sigmas or (simple_sigmas(spec.steps, spec.shift) if spec.schedule == "simple" else None)
    scheduler = _solver(spec.solver, spec.shift)
    scheduler.set_timesteps(len(given) - 1 if given else spec.steps, device="cpu")
    if given:
        scheduler.timesteps = torch.tensor(given[:-1]) * TRAIN_TIMESTEPS
        top = 1.0 if spec.solver == "euler" else _NEARLY_ONE
        scheduler.sigmas = torch.tensor(given).clamp(max=top)
    scheduler.set_begin_index(0)
    return scheduler


def schedule_of(spec: SampleSpec) -> list[float]:
    """The timestep of each step, in 0..1000."""
    return list(map(float, make_scheduler(spec).timesteps))


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


def denoise(
    predict: Callable[[Tensor, float, Step], Tensor],
    spec: SampleSpec,
    latent: Tensor,
    on_step: Callable[[int, int, Tensor], None] = lambda step, total, foreseen: None,
    around_step: Callable[[int], ContextManager] = lambda step: nullcontext(),
    known: Known | None = None,
) -> Tensor:
    """The denoised latent [B,C,T,H,W] in fp32, from a normalised `latent` (zeros where there is none to start from).

    predict: (latent, timestep in 0..1000, which step it is) -> velocity, all on the CPU.
    on_step: told after each step how many of how many are done, and the clean latent that this step foresaw.
    around_step: makes what step number 1, 2 ... is done in, `on_step` included.
    known: what is put into each latent that `predict` is given, and into what comes of it.
    """
    scheduler = make_scheduler(spec)
    sigmas, total = scheduler.sigmas, len(scheduler.timesteps)
    start = spec.sigmas[0] if spec.sigmas else 1.0  # both schedules begin at pure noise
    x = start * noise_of(latent.shape, spec.seed) + (1 - start) * latent
    timesteps = [*map(float, scheduler.timesteps), None]
    for step, timestep in enumerate(scheduler.timesteps):
        with around_step(step + 1):
            sigma = float(sigmas[step])
            seen = x if known is None else known.into(x, sigma)
            velocity = predict(seen, timesteps[step], Step(step, timesteps[step + 1]))
            foreseen = seen - sigma * velocity
            if known is not None:
                foreseen = known.into(foreseen)
                velocity = (x - foreseen) / sigma
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
            on_step(step + 1, total, foreseen)
    return x / (1 - float(sigmas[-1]))  # of a schedule cut short, as core ComfyUI hands it to the next sampler
