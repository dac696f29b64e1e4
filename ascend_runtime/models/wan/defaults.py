"""The default settings of the published Wan models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..defaults import Defaults, Distillation
from .files.configs import filled, reads_control
from .latents import CHANNELS_22

# The values are from generate.py and wan/configs of github.com/Wan-Video/Wan2.1 and Wan2.2.
WAN21_TEXT = Defaults("Wan2.1-T2V")
WAN21_IMAGE = Defaults("Wan2.1-I2V-14B", steps=40, small_shift=3.0)
WAN21_FIRST_LAST = Defaults("Wan2.1-FLF2V-14B", shift=16.0)
WAN22_TEXT = Defaults(
    "Wan2.2-T2V-A14B", steps=40, shift=12.0, guidance_scale=4.0, low_noise_guidance=3.0, boundary=0.875
)
WAN22_IMAGE = Defaults("Wan2.2-I2V-A14B", steps=40, guidance_scale=3.5, low_noise_guidance=3.5, boundary=0.9)
WAN22_BOTH = Defaults("Wan2.2-TI2V-5B", width=1280, height=704, num_frames=121, fps=24)
# Trained further, by others, for more inputs; no calibration of step caches is published for them.
FUN_CONTROL, FUN_CONTROL_5B, FUN_INPAINT_5B = (
    dataclasses.replace(base, name=name)
    for base, name in ((WAN22_IMAGE, "Wan Fun Control"), (WAN22_BOTH, "Wan2.2-Fun-5B-Control"),
                       (WAN22_BOTH, "Wan2.2-Fun-5B-InP"))
)  # fmt: skip
# Models and LoRAs for few steps, from these repositories' files: LightX2V configs/distill (steps 1000, 750, 500, 250
# before the shift); guandeh17/Self-Forcing configs/self_forcing_dmd.yaml (the same); tianweiy/CausVid
# configs/wan_bidirectional_dmd.yaml and hao-ai-lab/FastVideo examples/distill (timesteps 1000, 757, 522, as they are);
# NVlabs/rcm rcm/inference/wan2pt1_t2v_rcm_infer.py (angles 1.5, 1.4 and 1 as sin / (sin + cos), after pure noise).
# Rapid AIO: the model card of Phr00t/WAN2.2-14B-Rapid-AllInOne.
THREE_STEPS = (1.0, 0.757, 0.522, 0.0)
DISTILLATIONS = (
    Distillation("CausVid", r"caus_?vid", 3, sigmas=THREE_STEPS),
    Distillation("FastWan", r"fast_?wan|wandmdpipeline", 3, sigmas=THREE_STEPS),
    Distillation("Self-Forcing", r"self[-_ ]?forcing", 4, shift=5.0),
    Distillation("rCM", r"(?<![a-z])rcm(?![a-z])|turbo_?diffusion", 4, sigmas=(1.0, 0.9338, 0.8529, 0.609, 0.0)),
    Distillation("Rapid AIO", r"rapid[-_ ]?(mega[-_ ]?)?(aio|all_?in_?one)", 4),
    Distillation(
        "LightX2V",
        r"lightx2v.*(step|distill|lora)|step[-_ ]?distill|lightning.*\d[-_ ]?steps?|\d[-_ ]?steps?.*lightning"
        r"|\d[-_ ]?steps?[-_ ]lora",
        4, shift=5.0,
    ),
)  # fmt: skip


def defaults_of(config: Mapping[str, Any], experts: int) -> Defaults:
    """The defaults of the published model whose transformer has this config (diffusers' WanTransformer3DModel).

    A single expert of Wan2.2-T2V-A14B has the config of Wan2.1-T2V-14B, and is treated as that.
    """
    published = _published(filled(config), experts)
    if experts == 2 and published.boundary is None:
        return dataclasses.replace(published, boundary=WAN22_TEXT.boundary)
    return published


def _published(config: dict[str, Any], experts: int) -> Defaults:
    control = reads_control(config)
    if config["out_channels"] == CHANNELS_22:
        inpaint = config["in_channels"] != config["out_channels"]
        return FUN_CONTROL_5B if control else FUN_INPAINT_5B if inpaint else WAN22_BOTH
    if control:
        return FUN_CONTROL
    if config["in_channels"] == config["out_channels"]:
        return WAN22_TEXT if experts == 2 else WAN21_TEXT
    if config["image_dim"] is None:
        return WAN22_IMAGE
    return WAN21_FIRST_LAST if config["pos_embed_seq_len"] else WAN21_IMAGE
