"""Writes small random models under the names that ComfyUI's own templates ask for, into a subfolder of each folder of
models, so that they are not mixed up with those of published_models.

Core's own loaders read them too (comfy_nodes/small_loaders.py). What a LoRA changes is in fp16, as core rounds the sum
of weights in 8 bits and a LoRA to 8 bits.
"""

from pathlib import Path

import original_formats as formats
import published_models
import random_hunyuan
import random_lora
import random_wan
import tiny_llava
import tiny_models
import torch
from ascend_runtime.models.wan.files.names import to_diffusers_name
from diffusers import AutoencoderKLWan
from hunyuan_formats import comfyui_transformer, comfyui_vae
from published_hunyuan import CLIP_PIECES, LLAMA_PIECES, part
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

FOLDER = "stock"
LAYERS_OF_SLG = 11  # the templates that skip layers skip the tenth and the eleventh
I2V, FIVE_B = {"channels": 36}, {"out_channels": 48}
TRANSFORMERS = {  # file: how it differs from a text-to-video model of 16 channels; ref_conv: the channels that it reads
    "wan2.1_t2v_1.3B_fp16": {},
    "wan2.1_i2v_480p_14B_fp16": {**I2V, "image": True},
    "wan2.1_flf2v_720p_14B_fp16": {**I2V, "image": True},
    "wan2.1_fun_control_1.3B_bf16": {"channels": 48, "image": True, "layers": LAYERS_OF_SLG},
    "wan2.1_fun_inp_1.3B_bf16": {**I2V, "image": True, "layers": LAYERS_OF_SLG},
    "Wan2_1-I2V-ATI-14B_fp8_e4m3fn": {**I2V, "image": True},
    "wan2.2_ti2v_5B_fp16": {"channels": 48, **FIVE_B},
    "wan2.2_fun_control_5B_bf16": {"channels": 148, "ref_conv": 48, **FIVE_B},
    "wan2.2_fun_inpaint_5B_bf16": {"channels": 100, **FIVE_B},
}
EXPERTS = {  # the same of pairs for high and low noise
    "wan2.2_t2v_{}_noise_14B_fp8_scaled": {},
    "wan2.2_i2v_{}_noise_14B_fp8_scaled": I2V,
    "wan2.2_fun_inpaint_{}_noise_14B_fp8_scaled": I2V,
    "wan2.2_fun_control_{}_noise_14B_fp8_scaled": {"channels": 52, "ref_conv": 16},
}
IN_8_BITS = "fun_control"  # of the pairs, those that templates use without a LoRA
LORAS = {  # file: the transformer for which it is
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise": "wan2.2_t2v_{}_noise_14B_fp8_scaled",
    "wan2.2_i2v_lightx2v_4steps_lora_v1_{}_noise": "wan2.2_i2v_{}_noise_14B_fp8_scaled",
}
TWO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}  # a file does not show other axes of a head


def write_all(models: Path) -> None:
    """Into the folders of ComfyUI's `models`."""

    def place(folder: str, name: str) -> Path:
        file = models / folder / FOLDER / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    experts = {name.format(noise): form for name, form in EXPERTS.items() for noise in ("high", "low")}
    for seed, (name, form) in enumerate({**TRANSFORMERS, **experts}.items()):
        _transformer(place("diffusion_models", name), seed, **form)
    for noise in ("high", "low"):
        for name, transformer in LORAS.items():
            file = place("diffusion_models", transformer.format(noise))
            _lora(place("loras", name.format(noise)), load_file(file))
    for seed, (name, form) in enumerate(published_models.VAES.items()):
        vae = tiny_models.randomise(AutoencoderKLWan(**form), seed)
        save_file(formats.original_vae(vae), place("vae", name))
    _umt5(place("text_encoders", published_models.TEXT_ENCODER))
    published_models.clip_vision(place("clip_vision", published_models.CLIP))
    _hunyuan_video(place)


def _transformer(file: Path, seed: int, ref_conv: int = 0, **form) -> None:
    tensors = load_file(random_wan.original_transformer(file, seed=seed, **form))
    generator = torch.Generator().manual_seed(seed)
    if ref_conv:
        noise = torch.randn(random_wan.DIM, ref_conv, 2, 2, generator=generator)
        tensors["ref_conv.weight"] = noise / (4 * ref_conv) ** 0.5
        tensors["ref_conv.bias"] = 0.1 * torch.randn(random_wan.DIM, generator=generator)
    if "flf2v" in file.name:  # which numbers the tokens of both images
        shape = 1, 2 * published_models.IMAGE_TOKENS, random_wan.IMAGE_DIM
        tensors["img_emb.emb_pos"] = torch.randn(shape, generator=generator)
    rounded = {name: x.to(formats.FP8) for name, x in tensors.items()}
    if IN_8_BITS in file.name and "fp8_scaled" in file.name:
        biases = {name: x.float() for name, x in rounded.items() if name.endswith(".bias")}  # core 0.3.75 rounds them
        formats.save_old_mark(file, *formats.in_8_bits({**tensors, **biases}))
    elif "fp8_e4m3fn" in file.name:  # core rounds all tensors
        save_file({name: x if x.ndim == 2 else x.half() for name, x in rounded.items()}, file)
    else:
        save_file({name: x.half() for name, x in tensors.items()}, file)


def _lora(file: Path, tensors: dict) -> None:
    """In the layout of the published ones, without what core does not apply: differences of modulations."""
    random_lora.save(file, "lightx2v", {to_diffusers_name(name): x for name, x in tensors.items()}, seed=len(file.name))
    kept = {name: x for name, x in load_file(file).items() if "modulation" not in name and not name.endswith("diff_m")}
    save_file(kept, file)


def _umt5(file: Path) -> None:
    config = UMT5Config(vocab_size=40, d_model=random_wan.TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=2)
    encoder = tiny_models.randomise(UMT5EncoderModel(config), seed=0)
    save_file(formats.comfyui_umt5(encoder, formats.sentencepiece_model(), torch.float16), file)


def _hunyuan_video(place) -> None:
    """The transformer, both text encoders and the VAE of HunyuanVideo."""
    state = random_hunyuan.transformer("t2v", **TWO_HEADS).state_dict()
    _save(place("diffusion_models", "hunyuan_video_t2v_720p_bf16"), comfyui_transformer(state))
    _save(place("vae", "hunyuan_video_vae_bf16"), comfyui_vae(random_hunyuan.vae().state_dict()))
    llama = tiny_llava.llama(vocab_size=LLAMA_PIECES).state_dict()
    _save(place("text_encoders", "llava_llama3_fp8_scaled"), {f"model.{name}": x for name, x in llama.items()})
    clip = tiny_llava.clip_text(vocab_size=CLIP_PIECES, bos_token_id=CLIP_PIECES - 2, eos_token_id=CLIP_PIECES - 1)
    _save(place("text_encoders", "clip_l"), part(clip.state_dict(), "", "text_model."))


def _save(file: Path, tensors: dict) -> None:
    save_file({name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}, file)
