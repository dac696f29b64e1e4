"""What each published Wan model is run with where the user does not say: the original's own settings."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from ..specs import SampleSpec

TI2V_CHANNELS = 48  # of latents of the Wan 2.2 VAE; its models know of a given frame by its tokens' timestep 0
SMALL_PICTURE = 832 * 480  # pixels, up to which Wan2.1's image-to-video takes another shift


@dataclass(frozen=True)
class Defaults:
    """name: of the published model. steps, shift, guidance_scale: as in SampleSpec.

    low_noise_guidance, boundary: of models with two experts. small_shift: the shift of pictures of up to SMALL_PICTURE
    pixels, where it is another. num_frames, fps: of the videos that it was trained for.
    """

    name: str
    steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 5.0
    low_noise_guidance: float | None = None
    boundary: float | None = None
    small_shift: float | None = None
    num_frames: int = 81
    fps: int = 16

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
WAN22_BOTH = Defaults("Wan2.2-TI2V-5B", num_frames=121, fps=24)


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
