"""Files that are near to what can be used, and are not: known by names, so that a refusal says what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# Networks that have a Wan transformer's parameters and more: what the further ones' names have in them.
VARIANTS = {
    "Wan VACE": r"(^|\.)vace_",
    "Wan Fun Control with a camera": r"(^|\.)control_adapter\.",
    "Wan Fun Control": r"(^|\.)ref_conv\.",
    "Wan Animate": r"(^|\.)(pose_patch_embedding|face_adapter|face_encoder|motion_encoder)\.",
    "Wan S2V (sound to video)": r"(^|\.)(audio_injector|casual_audio_encoder|cond_encoder|frame_packer"
    r"|trainable_cond_mask)\.",
    "an audio-driven model, such as HuMo": r"(^|\.)(audio_proj|audio_cross_attn_wrapper|audio_cross_attn|norm_x)\.",
    "SkyReels diffusion forcing": r"(^|\.)fps_(embedding|projection)\.",
    "ReCamMaster": r"^blocks\.\d+\.(cam_encoder|projector)\.",
    "UniAnimate": r"(^|\.)(dwpose_embedding|randomref_embedding_pose)\.",
}
FEW = 4  # names that are shown
SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.\w+)$")


def variant(names: Iterable[str]) -> str:
    """That a network is one of those with parameters of these names, which a Wan transformer has not; empty where none
    is known."""
    names = list(names)
    for what, pattern in VARIANTS.items():
        own = [name for name in names if re.search(pattern, name)]
        if own:
            return (
                f"It is {what}, with {len(own)} additional tensors ({_first(own)}) cannot be used here. Take a "
                "text-to-video or an image-to-video model, such as Wan2.2-T2V-A14B or Wan2.2-I2V-A14B."
            )
    return ""


def one_of_several(file: Path) -> str:
    """That a file is a part of a network, where its name says so; else empty."""
    named = SHARD.match(file.name)
    if named is None or int(named[3]) < 2:
        return ""
    return (
        f"By its name it is shard {int(named[2])} of {int(named[3])} of one network. Give its folder, {file.parent}, "
        f"in which all {int(named[3])} must lie."
    )


def all_shards(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """`files` where they are the shards of one network by their names; none where they are not named so.

    Raises ValueError where shards of it are missing, or belong to several networks.
    """
    named = [SHARD.match(file.name) for file in files]
    if not files or not all(named):
        return ()
    networks = sorted({(match[1], match[3], match[4]) for match in named})
    if len(networks) > 1:
        shown = _first([f"{name}-...-of-{count}{suffix}" for name, count, suffix in networks])
        raise ValueError(f"{files[0].parent} holds shards of several networks: {shown}. Give each a folder of its own.")
    count, there = int(networks[0][1]), {int(match[2]) for match in named}
    if len(there) < count:
        missing = [number for number in range(1, min(count, 100_000) + 1) if number not in there]
        raise ValueError(f"{files[0].parent} lacks shard {_first(missing)} of {count}. Download what is missing.")
    return files


def _first(things: list) -> str:
    return ", ".join([*map(str, things[:FEW]), *(["..."] if len(things) > FEW else [])])
