"""What the published Wan models are run with."""

from __future__ import annotations

from ..defaults import Defaults

TI2V_CHANNELS = 48  # of latents of the Wan 2.2 VAE; its models know of a given frame by its tokens' timestep 0
# The figures are those of generate.py and wan/configs of the originals (github.com/Wan-Video/Wan2.1 and Wan2.2).
WAN21_TEXT = Defaults("Wan2.1-T2V")
WAN21_IMAGE = Defaults("Wan2.1-I2V-14B", steps=40, small_shift=3.0)
WAN21_FIRST_LAST = Defaults("Wan2.1-FLF2V-14B", shift=16.0)
WAN22_TEXT = Defaults(
    "Wan2.2-T2V-A14B", steps=40, shift=12.0, guidance_scale=4.0, low_noise_guidance=3.0, boundary=0.875
)
WAN22_IMAGE = Defaults("Wan2.2-I2V-A14B", steps=40, guidance_scale=3.5, low_noise_guidance=3.5, boundary=0.9)
WAN22_BOTH = Defaults("Wan2.2-TI2V-5B", width=1280, height=704, num_frames=121, fps=24)


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
