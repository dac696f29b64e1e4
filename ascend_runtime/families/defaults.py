"""What a model is run with where the user does not say: what the file next to it says, else the original's settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from ..checkpoints.bounded import read_json
from ..checkpoints.layout import Component, find_transformer, has_low_noise
from ..specs import SampleSpec, VideoSize

TI2V_CHANNELS = 48  # of latents of the Wan 2.2 VAE; its models know of a given frame by its tokens' timestep 0
SMALL_PICTURE = 832 * 480  # pixels, up to which Wan2.1's image-to-video takes another shift
MAX_FPS = 240


@dataclass(frozen=True)
class Defaults:
    """name: of the published model. steps, shift, guidance_scale: as in SampleSpec.

    low_noise_guidance, boundary: of models with two experts. small_shift: the shift of pictures of up to SMALL_PICTURE
    pixels, where it is another. width, height, num_frames, fps: of the videos that it was trained for. source: the
    model's own file, where that says some of this.
    """

    name: str
    steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 5.0
    low_noise_guidance: float | None = None
    boundary: float | None = None
    small_shift: float | None = None
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    source: Path | None = None

    @property
    def size(self) -> VideoSize:
        return VideoSize(width=self.width, height=self.height, num_frames=self.num_frames)

    def fill(self, spec: SampleSpec, pixels: int) -> SampleSpec:
        """`spec` with what it leaves to the model, for pictures of so many pixels.

        A guidance scale that is given is that of both experts.
        """
        shift = self.small_shift if self.small_shift and pixels <= SMALL_PICTURE else self.shift
        own = {"steps": self.steps, "shift": shift, "guidance_scale": self.guidance_scale}
        if spec.guidance_scale is None:
            own["guidance_scale_low_noise"] = self.low_noise_guidance
        return replace(spec, **{name: value for name, value in own.items() if getattr(spec, name) is None})


# The figures are those of generate.py and wan/configs of the originals (github.com/Wan-Video/Wan2.1 and Wan2.2).
WAN21_TEXT = Defaults("Wan2.1-T2V")
WAN21_IMAGE = Defaults("Wan2.1-I2V-14B", steps=40, small_shift=3.0)
WAN21_FIRST_LAST = Defaults("Wan2.1-FLF2V-14B", shift=16.0)
WAN22_TEXT = Defaults(
    "Wan2.2-T2V-A14B", steps=40, shift=12.0, guidance_scale=4.0, low_noise_guidance=3.0, boundary=0.875
)
WAN22_IMAGE = Defaults("Wan2.2-I2V-A14B", steps=40, guidance_scale=3.5, low_noise_guidance=3.5, boundary=0.9)
WAN22_BOTH = Defaults("Wan2.2-TI2V-5B", width=1280, height=704, num_frames=121, fps=24)


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
    published, file = defaults_of(component.config, experts), component.defaults
    return published if file is None else _own(file, published.name).over(published, file)


def _own(file: Path, published: str) -> Own:
    mend = f"Correct it, or remove it: the model is then run as {published} is."
    content = read_json(file, mend)
    try:
        return msgspec.convert(content, Own)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error} {mend}") from None


def defaults_of(config: dict, experts: int) -> Defaults:
    """Those of the published model whose transformer has this config (diffusers' WanTransformer3DModel).

    One expert of Wan2.2-T2V-A14B alone looks as Wan2.1-T2V-14B does, and is taken for it.
    """
    inputs, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
    if outputs == TI2V_CHANNELS:
        return WAN22_BOTH
    if inputs == outputs:
        return WAN22_TEXT if experts == 2 else WAN21_TEXT
    if config.get("image_dim") is None:
        return WAN22_IMAGE
    return WAN21_FIRST_LAST if config.get("pos_embed_seq_len") else WAN21_IMAGE
