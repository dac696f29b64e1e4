"""A model's default settings: from the file next to it, else those of the published model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from ..checkpoints.bounded import read_json
from ..errors import coded_error
from ..models.defaults import Defaults
from ..specs import DiffusionModelSpec, SampleSpec, VideoSize
from .component import Component
from .distilled import with_distillation
from .folders import has_low_noise
from .layout import find_transformer

MAX_FPS = 240


class DefaultsFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a model's ascend_defaults.json, with the fields of Defaults, SampleSpec and VideoSize. Omitted
    fields default to the published model's. Raises ValueError for values that these classes do not accept."""

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_scale_low_noise: float | None = None
    embedded_guidance: float | None = None
    static_steps: tuple[int, int] | None = None

    def __post_init__(self):
        VideoSize(**self._given("width", "height", "num_frames"))
        SampleSpec(**self._given("steps", "shift", "guidance_scale", "guidance_scale_low_noise", "embedded_guidance"))
        if self.fps is not None and not 1 <= self.fps <= MAX_FPS:
            raise ValueError(f"fps is {self.fps}; it must lie between 1 and {MAX_FPS}.")
        first, end = self.static_steps or (0, 1)
        if not 0 <= first < end:
            raise ValueError(f"static_steps is [{first}, {end}]; it must be [first, end], with 0 <= first < end.")

    def over(self, published: Defaults, source: Path) -> Defaults:
        """`published`, overridden by this file. If the file has one guidance scale, it is used for both experts."""
        given = self._given(*(name for name in asdict(self) if name != "guidance_scale_low_noise"))
        if self.guidance_scale_low_noise is not None or self.guidance_scale is not None:
            given["low_noise_guidance"] = self.guidance_scale_low_noise
        if self.shift is not None:
            given["small_shift"] = None
        return dataclasses.replace(published, source=source, **given)

    def _given(self, *names: str) -> dict:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def model_defaults(path: str, low_noise_path: str | None = None) -> Defaults:
    """The default settings of the model at `path`. Raises ValueError if there is no model.

    path, low_noise_path: as in DiffusionModelSpec. Reads no weights.
    """
    two = low_noise_path is not None or has_low_noise(path)
    spec = DiffusionModelSpec(path=str(path), low_noise_path=low_noise_path)
    return defaults_for(spec, find_transformer(path), experts=2 if two else 1)


def defaults_for(spec: DiffusionModelSpec, component: Component, experts: int) -> Defaults:
    """The defaults of a model with its LoRAs. component: its first expert, of `experts`. Raises ValueError as
    `defaults_in` does."""
    own = defaults_in(component, experts)
    return with_distillation(own, component.family.distillations, spec, experts)


def defaults_in(component: Component, experts: int) -> Defaults:
    """The defaults of a model with `experts` experts, the first of which is `component`, without LoRAs and whatever its
    files are called. Raises ValueError if the model's own file is invalid."""
    published, file = component.family.defaults(component.config, experts), component.defaults
    return published if file is None else _own(file, published.name).over(published, file)


def _own(file: Path, published: str) -> DefaultsFile:
    advice = f"Correct it, or remove it to use the defaults of {published}."
    content = read_json(file, advice)
    try:
        return msgspec.convert(content, DefaultsFile)
    except ValueError as error:
        raise coded_error("AV-1309", f"{file} cannot be used: {error} {advice}") from None
