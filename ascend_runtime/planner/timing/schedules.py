"""The timesteps of a schedule, without torch."""

from __future__ import annotations

import numpy as np

from ...models.family import Family
from ...specs import SampleSpec
from ...specs.jobs import SIMPLE

TIMESTEPS = 1000  # of training


def timesteps_of(spec: SampleSpec, family: Family) -> list[float]:
    """The timestep of each step of the run, in 0..1000, as the schedulers of `engine.sampling` have them."""
    return _whole(spec, family)[: spec.ends_at]


def _whole(spec: SampleSpec, family: Family) -> list[float]:
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
