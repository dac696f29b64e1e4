"""A model's default settings."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from ..specs import SampleSpec, VideoSize

SMALL_PICTURE = 832 * 480  # pixels of a frame up to which Wan2.1 image-to-video uses another shift
STEPS_IN_NAME = re.compile(r"(?<![a-z0-9])(\d{1,2})[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class Distillation:
    """How a model, or a LoRA for it, was trained to make a video in few steps and without a negative prompt.

    name: as its authors call it. marks: a pattern for the names of its files, in lower case. steps, shift: for which it
    was trained; a name such as "8steps" takes their place. sigmas: the noise levels if no shift gives them.
    """

    name: str
    marks: str
    steps: int = 4
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None

    def is_named(self, name: str) -> bool:
        return re.search(self.marks, name.lower()) is not None

    def over(self, own: Defaults, name: str) -> Defaults:
        """`own`, of the model that was distilled, with the settings of its few steps. name: of the file that shows the
        distillation."""
        named = STEPS_IN_NAME.search(name.lower())
        steps = int(named[1]) if named and int(named[1]) > 0 else self.steps
        shift = self.shift or own.shift
        return dataclasses.replace(
            own,
            steps=steps,
            sigmas=self.sigmas if self.sigmas and steps == self.steps else _evenly(steps, shift),
            shift=shift,
            small_shift=None if self.shift else own.small_shift,
            guidance_scale=1.0,
            low_noise_guidance=None,
            solver="euler",
            distilled=self.name,
        )


def _evenly(steps: int, shift: float) -> tuple[float, ...]:
    """The noise levels of few steps: evenly from 1 before the shift, as LightX2V trains. An Euler solver's own go down
    to almost 0 in the last but one."""
    even = (1 - step / steps for step in range(steps))
    return (*(shift * level / (1 + (shift - 1) * level) for level in even), 0.0)


@dataclass(frozen=True)
class Defaults:
    """The default settings of a model. name: of the published model. steps, shift, guidance_scale, embedded_guidance,
    solver: as in SampleSpec; embedded_guidance is None for a model that reads none.

    low_noise_guidance, boundary: for models with two experts. small_shift: the shift for frames of up to SMALL_PICTURE
    pixels, if it differs. width, height, num_frames, fps: of the videos that it was trained for. static_steps: (first,
    end) of the steps, counted from 0, in which W8A8_TIMESTEP layers use their static scales; None: in none. source: the
    model's own file, if some of these values come from it. distilled: how the model was distilled to few steps; None:
    it was not. sigmas: noise levels that take the place of steps and shift if neither is given.
    """

    name: str
    steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 5.0
    embedded_guidance: float | None = None
    solver: str = "unipc"
    low_noise_guidance: float | None = None
    boundary: float | None = None
    small_shift: float | None = None
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    static_steps: tuple[int, int] | None = None
    source: Path | None = None
    distilled: str | None = None
    sigmas: tuple[float, ...] | None = None

    @property
    def size(self) -> VideoSize:
        return VideoSize(width=self.width, height=self.height, num_frames=self.num_frames)

    def static_step(self, step: int) -> int | None:
        """`step`, if W8A8_TIMESTEP layers use their static scales in it, else None."""
        first, end = self.static_steps or (0, 0)
        return step if first <= step < end else None

    def fill(self, spec: SampleSpec, pixels: int) -> SampleSpec:
        """`spec` with its unset fields filled in, for frames of this number of pixels.

        If `spec` has one guidance scale, it is used for both experts.
        """
        shift = self.small_shift if self.small_shift and pixels <= SMALL_PICTURE else self.shift
        own = {"steps": self.steps, "shift": shift, "guidance_scale": self.guidance_scale, "solver": self.solver,
               "embedded_guidance": self.embedded_guidance}  # fmt: skip
        if spec.guidance_scale is None:
            own["guidance_scale_low_noise"] = self.low_noise_guidance
        if spec.steps is None and spec.shift is None:
            own["sigmas"] = self.sigmas
        return replace(spec, **{name: value for name, value in own.items() if getattr(spec, name) is None})
