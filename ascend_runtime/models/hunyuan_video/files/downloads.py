"""The files that HunyuanVideo's models need, on hubs."""

from __future__ import annotations

from ...hubs import repackaged

_REPOSITORY = "HunyuanVideo_repackaged"
_FROM_TEXT = repackaged(_REPOSITORY, "text_encoders", "llava_llama3_fp8_scaled", "clip_l") + repackaged(
    _REPOSITORY, "vae", "hunyuan_video_vae_bf16"
)
_FROM_IMAGE = _FROM_TEXT + repackaged(_REPOSITORY, "clip_vision", "llava_llama3_vision")


def _model(name: str):
    return repackaged(_REPOSITORY, "diffusion_models", name)


DOWNLOADS = {
    "HunyuanVideo": _model("hunyuan_video_t2v_720p_bf16") + _FROM_TEXT,
    "HunyuanVideo-I2V-v1": _model("hunyuan_video_image_to_video_720p_bf16") + _FROM_IMAGE,
    "HunyuanVideo-I2V-v2": _model("hunyuan_video_v2_replace_image_to_video_720p_bf16") + _FROM_IMAGE,
}
