"""Recognises similar but unsupported networks by their tensor names, so that an error can say what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ....checkpoints.shards import first

# Networks with a Wan transformer's parameters and additional ones: a pattern of the additional names.
VARIANTS = {
    "Wan VACE": r"(^|\.)vace_",
    "Wan Fun Control with a camera": r"(^|\.)control_adapter\.",
    "Wan Animate": r"(^|\.)(pose_patch_embedding|face_adapter|face_encoder|motion_encoder)\.",
    "Wan S2V (sound to video)": r"(^|\.)(audio_injector|casual_audio_encoder|cond_encoder|frame_packer"
    r"|trainable_cond_mask)\.",
    "an audio-driven model, such as HuMo": r"(^|\.)(audio_proj|audio_cross_attn_wrapper|audio_cross_attn|norm_x)\.",
    "SkyReels diffusion forcing": r"(^|\.)fps_(embedding|projection)\.",
    "ReCamMaster": r"^blocks\.\d+\.(cam_encoder|projector)\.",
    "Wan SCAIL": r"(^|\.)patch_embedding_(pose|mask)\.",
    "WanDancer": r"(^|\.)patch_embedding_global\.",
    "UniAnimate": r"(^|\.)(dwpose_embedding|randomref_embedding_pose)\.",
}


def variant(names: Iterable[str]) -> str:
    """A sentence about the network with these additional parameter names; empty if it is unknown."""
    names = list(names)
    for what, pattern in VARIANTS.items():
        own = [name for name in names if re.search(pattern, name)]
        if own:
            return (
                f"It is {what}, with {len(own)} additional tensors ({first(own)}), which is not supported. Use a "
                "text-to-video or an image-to-video model, such as Wan2.2-T2V-A14B or Wan2.2-I2V-A14B."
            )
    return ""


def only_blocks(names: Iterable[str]) -> str:
    """A sentence about a file that holds only blocks, of which the network has more parts; else empty."""
    if not all(name.startswith("blocks.") for name in names):
        return ""
    return (
        "It holds only blocks, like LightX2V's files of single blocks. Give the folder that holds "
        "non_block.safetensors and all blocks, or the model's form in one file."
    )
