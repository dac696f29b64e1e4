"""Recognises similar but unsupported networks, by tensor names or by the classes that configs name, so that an error
can say what they are."""

from __future__ import annotations

import re

from ....checkpoints.shards import first
from ...shapes import Shapes

USE = (
    "Use a model of HunyuanVideo 1.0 of Comfy-Org/HunyuanVideo_repackaged: hunyuan_video_t2v_720p_bf16.safetensors, or "
    "for images hunyuan_video_image_to_video_720p_bf16.safetensors (v1) or "
    "hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors."
)
USE_VAE = "Use the VAE of HunyuanVideo 1.0: hunyuan_video_vae_bf16.safetensors of Comfy-Org/HunyuanVideo_repackaged."
VIDEO_15, IMAGE, FRAMEPACK = "HunyuanVideo 1.5", "HunyuanImage", "FramePack"
SKYREELS = "SkyReels (image to video)"
# Networks with a HunyuanVideo transformer's refiner and further tensors: a pattern of these, in any system's names
# (diffusers; comfy/ldm/hunyuan_video/model.py; Tencent-Hunyuan/HunyuanVideo-Avatar, hymm_sp/modules/models_audio.py).
VARIANTS = {
    VIDEO_15: r"(^|\.)(cond_type_embed(ding)?|image_embedder|vision_in)\.",
    IMAGE: r"(^|\.)(byt5_in|context_embedder_2|time_guidance_embed|time_r_in)\.",
    FRAMEPACK: r"(^|\.)(clean_x_embedder|image_projection)\.",
    "HunyuanVideo-Avatar or HunyuanCustom with audio": r"(^|\.)(audio_proj(ection)?|audio_adapter_blocks|motion_exp"
    r"|motion_pose|fps_proj|ref_in|before_proj)\.",
}
SKYREELS_CHANNELS = 32  # that it reads: the latent, and the image's
VIDEO_15_CHANNELS = (65, 98)  # that it reads, the latter for super-resolution
# diffusers' classes.
CLASSES = {
    "HunyuanVideo15Transformer3DModel": VIDEO_15,
    "HunyuanVideoFramepackTransformer3DModel": FRAMEPACK,
    "HunyuanImageTransformer2DModel": IMAGE,
    "HunyuanDiT2DModel": "HunyuanDiT, an image model",
    "SkyReelsV2Transformer3DModel": "SkyReels V2, a variant of Wan",
}
VAE_CLASSES = {
    "AutoencoderKLHunyuanVideo15": VIDEO_15,
    "AutoencoderKLHunyuanImage": IMAGE,
    "AutoencoderKLHunyuanImageRefiner": "the HunyuanImage refiner",
}
CHANNELS_15 = 32  # of the latents of 1.5


def variant(shapes: Shapes) -> str:
    """A sentence about a network with tensors of these names and shapes; empty if it is unknown."""
    for what, pattern in VARIANTS.items():
        own = [name for name in shapes if re.search(pattern, name)]
        if own and _has_refiner(shapes):
            return f"It is {what}, with {len(own)} additional tensors ({first(own)}), which is not supported. {USE}"
    reads = next((shape[1] for name, shape in shapes.items() if _reads_patches(name) and len(shape) > 2), 0)
    return of_channels(reads)


def of_channels(reads: int) -> str:
    """A sentence about a network that reads so many channels; empty if it is unknown."""
    what = SKYREELS if reads == SKYREELS_CHANNELS else VIDEO_15 if reads in VIDEO_15_CHANNELS else ""
    return f"It is {what}, which reads {reads} channels and is not supported. {USE}" if what else ""


def _has_refiner(shapes: Shapes) -> bool:
    return any("token_refiner" in name for name in shapes)


def _reads_patches(name: str) -> bool:
    return name in ("x_embedder.proj.weight", "img_in.proj.weight")


def other_vae(shapes: Shapes) -> str:
    """A sentence about a VAE with tensors of these names and shapes that is not HunyuanVideo's; empty if unknown."""
    latent = shapes.get("decoder.conv_in.conv.weight", ())
    if len(latent) == 5 and latent[1] == CHANNELS_15:
        what = f"It is the VAE of {VIDEO_15}, whose latents have {CHANNELS_15} channels"
        return f"{what}, which is not supported. {USE_VAE}"
    return ""
