"""Writes small random HunyuanVideo models under the names and in the formats of the files that the workflows ask for.

Their prompts are read by the tokenizers that come with ComfyUI, so the encoders know as many pieces as the published.
"""

from pathlib import Path

import hunyuan_formats
import original_formats as formats
import random_hunyuan
import tiny_llava
import torch
from safetensors.torch import save_file

TRANSFORMERS = {  # file: its kind in random_hunyuan
    "hunyuan_video_t2v_720p_bf16": "t2v",
    "hunyuan_video_image_to_video_720p_bf16": "i2v concat",
    "hunyuan_video_v2_replace_image_to_video_720p_bf16": "i2v replace",
}
AS_PUBLISHED = {"num_attention_heads": 1, "attention_head_dim": 128}  # a file does not show other axes of a head
VISION = "llava_llama3_vision"
LLAMA_PIECES, CLIP_PIECES = 128_320, 49_408


def write_all(models: Path) -> None:
    """Into the folders of ComfyUI's `models`, once."""
    if (models / "clip_vision" / f"{VISION}.safetensors").is_file():
        return

    def place(folder: str, name: str) -> Path:
        (models / folder).mkdir(parents=True, exist_ok=True)
        return models / folder / f"{name}.safetensors"

    for seed, (name, kind) in enumerate(TRANSFORMERS.items()):
        state = random_hunyuan.transformer(kind, seed, **AS_PUBLISHED).state_dict()
        _save(place("diffusion_models", name), hunyuan_formats.comfyui_transformer(state))
    _save(place("vae", "hunyuan_video_vae_bf16"), hunyuan_formats.comfyui_vae(random_hunyuan.vae().state_dict()))
    llava = tiny_llava.llava(vocab_size=LLAMA_PIECES).state_dict()
    llama = part(llava, "language_model.", "model.")
    formats.save_old_mark(place("text_encoders", "llava_llama3_fp8_scaled"), *formats.in_8_bits(llama))
    clip = tiny_llava.clip_text(vocab_size=CLIP_PIECES, bos_token_id=CLIP_PIECES - 2, eos_token_id=CLIP_PIECES - 1)
    _save(place("text_encoders", "clip_l"), part(clip.state_dict(), "", "text_model."))
    vision = part(llava, "vision_tower.", "vision_model.") | part(llava, "multi_modal_projector.", "", keeps=True)
    _save(place("clip_vision", VISION), vision)


def part(state: dict, begin: str, prefix: str, keeps: bool = False) -> dict:
    """The tensors of a part of a network, by any version of transformers, with names of their own behind a prefix."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name.startswith(begin):
            own = name if keeps else name.removeprefix(begin).removeprefix(prefix)
            found[prefix + own] = tensor.clone()
    assert found, f"no tensor begins with {begin}"
    return found


def _save(file: Path, tensors: dict) -> None:
    save_file({name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}, file)
