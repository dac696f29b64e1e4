"""The files that Wan's models need, on hubs."""

from __future__ import annotations

from ...hubs import repackaged

_OLDER, _NEWER = "Wan_2.1_ComfyUI_repackaged", "Wan_2.2_ComfyUI_Repackaged"
_ENCODER = repackaged(_OLDER, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled")
_WITH_VAE = _ENCODER + repackaged(_OLDER, "vae", "wan_2.1_vae")
_WITH_CLIP_VISION = _WITH_VAE + repackaged(_OLDER, "clip_vision", "clip_vision_h")


def _older(name: str):
    return repackaged(_OLDER, "diffusion_models", name)


def _experts(kind: str, dtype: str):
    names = (f"wan2.2_{kind}_{noise}_noise_14B_{dtype}" for noise in ("high", "low"))
    return repackaged(_NEWER, "diffusion_models", *names) + _WITH_VAE


def _four_steps(kind: str, version: str):
    """The experts, and LightX2V's LoRAs for 4 steps."""
    names = (f"wan2.2_{kind}_lightx2v_4steps_lora_{version}_{noise}_noise" for noise in ("high", "low"))
    return _experts(kind, "fp8_scaled") + repackaged(_NEWER, "loras", *names)


DOWNLOADS = {
    "Wan2.1-T2V-1.3B": _older("wan2.1_t2v_1.3B_fp16") + _WITH_VAE,
    "Wan2.1-T2V-14B": _older("wan2.1_t2v_14B_fp16") + _WITH_VAE,
    "Wan2.1-I2V-14B": _older("wan2.1_i2v_480p_14B_fp16") + _WITH_CLIP_VISION,
    "Wan2.1-I2V-14B-720p": _older("wan2.1_i2v_720p_14B_fp16") + _WITH_CLIP_VISION,
    "Wan2.1-FLF2V-14B": _older("wan2.1_flf2v_720p_14B_fp16") + _WITH_CLIP_VISION,
    "Wan2.2-T2V-A14B": _experts("t2v", "fp8_scaled"),
    "Wan2.2-T2V-A14B-fp16": _experts("t2v", "fp16"),
    "Wan2.2-T2V-A14B-4-steps": _four_steps("t2v", "v1.1"),
    "Wan2.2-I2V-A14B": _experts("i2v", "fp8_scaled"),
    "Wan2.2-I2V-A14B-fp16": _experts("i2v", "fp16"),
    "Wan2.2-I2V-A14B-4-steps": _four_steps("i2v", "v1"),
    "Wan2.2-TI2V-5B": repackaged(_NEWER, "diffusion_models", "wan2.2_ti2v_5B_fp16") + _ENCODER
    + repackaged(_NEWER, "vae", "wan2.2_vae"),
}  # fmt: skip
