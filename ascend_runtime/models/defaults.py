"""A model's default settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from ..specs import SampleSpec, VideoSize

SMALL_PICTURE = 832 * 480  # pixels of a frame up to which Wan2.1 image-to-video uses another shift


@dataclass(frozen=True)
class Defaults:
    """The default settings of a model. name: of the published model. steps, shift, guidance_scale, embedded_guidance,
    solver: as in SampleSpec; embedded_guidance is None for a model that reads none.

    low_noise_guidance, boundary: for models with two experts. small_shift: the shift for frames of up to SMALL_PICTURE
    pixels, if it differs. width, height, num_frames, fps: of the videos that it was trained for. static_steps: (first,
    end) of the steps, counted from 0, in which W8A8_TIMESTEP layers use their static scales; None: in none. source: the
    model's own file, if some of these values come from it.
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
        return replace(spec, **{name: value for name, value in own.items() if getattr(spec, name) is None})
