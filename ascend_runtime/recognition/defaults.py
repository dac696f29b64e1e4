"""What a model is run with: what the file next to it says, else as the published model is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from ..checkpoints.bounded import read_json
from ..models.defaults import Defaults
from ..specs import SampleSpec, VideoSize
from .component import Component
from .folders import has_low_noise
from .layout import find_transformer

MAX_FPS = 240


class Own(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file ascend_defaults.json of a model may say, each as in Defaults, SampleSpec and VideoSize; what it
    leaves out is the published model's. Raises ValueError for what these refuse."""

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_scale_low_noise: float | None = None

    def __post_init__(self):
        VideoSize(**self._given("width", "height", "num_frames"))
        SampleSpec(**self._given("steps", "shift", "guidance_scale", "guidance_scale_low_noise"))
        if self.fps is not None and not 1 <= self.fps <= MAX_FPS:
            raise ValueError(f"fps is {self.fps}; it must lie between 1 and {MAX_FPS}.")

    def over(self, published: Defaults, source: Path) -> Defaults:
        """`published` with what this says in its place. One guidance scale is that of both experts."""
        given = self._given(*(name for name in asdict(self) if name != "guidance_scale_low_noise"))
        if self.guidance_scale_low_noise is not None or self.guidance_scale is not None:
            given["low_noise_guidance"] = self.guidance_scale_low_noise
        if self.shift is not None:
            given["small_shift"] = None
        return dataclasses.replace(published, source=source, **given)

    def _given(self, *names: str) -> dict:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def model_defaults(path: str, low_noise_path: str | None = None) -> Defaults:
    """What the model at `path` is run with where the user does not say. Raises ValueError where there is no model.

    path, low_noise_path: as in DiffusionModelSpec. No weight is read.
    """
    two = low_noise_path is not None or has_low_noise(path)
    return defaults_in(find_transformer(path), experts=2 if two else 1)


def defaults_in(component: Component, experts: int) -> Defaults:
    """Those of a model of so many experts, by the files of its first. Raises ValueError where its own file cannot be
    used."""
    published, file = component.family.defaults(component.config, experts), component.defaults
    return published if file is None else _own(file, published.name).over(published, file)


def _own(file: Path, published: str) -> Own:
    mend = f"Correct it, or remove it: the model is then run as {published} is."
    content = read_json(file, mend)
    try:
        return msgspec.convert(content, Own)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error} {mend}") from None
