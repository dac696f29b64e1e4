"""Writes small random weights under the names and in the formats of the published files that the workflows ask for."""

import json
import re
import struct
from pathlib import Path

import original_formats as formats
import random_lora
import random_wan
import tiny_models
import torch
from ascend_runtime.models.wan.files.names import to_diffusers_name
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

IMAGE_TOKENS = 257  # of one image in CLIP
TRANSFORMERS = {  # file: what random_wan.original_transformer is asked for
    "wan2.1_t2v_1.3B_fp16": {},
    "wan2.1_t2v_14B_fp16": {"layers": 3},
    "wan2.1_i2v_480p_14B_fp16": {"channels": 36, "image": True},
    "wan2.1_flf2v_720p_14B_fp16": {"channels": 36, "image": True},
    "wan2.2_t2v_high_noise_14B_fp8_scaled": {},
    "wan2.2_t2v_low_noise_14B_fp8_scaled": {},
    "wan2.2_i2v_high_noise_14B_fp8_scaled": {"channels": 36},
    "wan2.2_i2v_low_noise_14B_fp8_scaled": {"channels": 36},
    "wan2.2_ti2v_5B_fp16": {"channels": 48, "out_channels": 48},
}
LORAS = {  # file: the transformer that it is for
    f"wan2.2_i2v_lightx2v_4steps_lora_v1_{expert}_noise": f"wan2.2_i2v_{expert}_noise_14B_fp8_scaled"
    for expert in ("high", "low")
}
LATER_LORAS = {  # likewise; commit 5cb33f3 had no workflow with them
    f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{expert}_noise": f"wan2.2_t2v_{expert}_noise_14B_fp8_scaled"
    for expert in ("high", "low")
}
VAES = {
    "wan_2.1_vae": {"base_dim": 4},
    "wan2.2_vae": {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": 12,
                   "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
}  # fmt: skip
TEXT_ENCODER, CLIP = "umt5_xxl_fp8_e4m3fn_scaled", "clip_vision_h"


def write_all(models: Path) -> None:
    """Into the folders of ComfyUI's `models`."""

    def place(folder: str, name: str) -> Path:
        (models / folder).mkdir(parents=True, exist_ok=True)
        return models / folder / f"{name}.safetensors"

    for seed, (name, form) in enumerate(TRANSFORMERS.items()):
        _transformer(place("diffusion_models", name), seed=seed, **form)
    for seed, (name, transformer) in enumerate((LORAS | LATER_LORAS).items()):
        tensors = load_file(models / "diffusion_models" / f"{transformer}.safetensors")
        parameters = {to_diffusers_name(key): tensor for key, tensor in tensors.items()}
        random_lora.save(place("loras", name), "lightx2v", parameters, seed=seed, dtype=torch.float16)
    for seed, (name, form) in enumerate(VAES.items()):
        vae = tiny_models.randomise(AutoencoderKLWan(**form), seed)
        save_file(formats.original_vae(vae), place("vae", name))
    _text_encoder(place("text_encoders", TEXT_ENCODER))
    clip_vision(place("clip_vision", CLIP))


def _transformer(file: Path, **form) -> None:
    tensors = load_file(random_wan.original_transformer(file, **form))
    if "flf2v" in file.name:  # which tells the first image's tokens from the last's
        generator = torch.Generator().manual_seed(form["seed"])
        tensors["img_emb.emb_pos"] = torch.randn(1, 2 * IMAGE_TOKENS, random_wan.IMAGE_DIM, generator=generator)
    if "fp8_scaled" in file.name:
        formats.save_old_mark(file, *formats.in_8_bits(tensors))
    else:
        save_file({name: tensor.half() for name, tensor in tensors.items()}, file)


def _text_encoder(file: Path) -> None:
    config = UMT5Config(vocab_size=40, d_model=random_wan.TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=1)
    encoder = tiny_models.randomise(UMT5EncoderModel(config), seed=0)
    formats.save_old_mark(file, *formats.in_8_bits(formats.comfyui_umt5(encoder, formats.sentencepiece_model())))


def clip_vision(file: Path) -> None:
    """CLIP ViT-H in fp16, of which the tests' ComfyUI takes two layers: the others are a hole in a sparse file."""
    with torch.device("meta"):
        network = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        ))  # fmt: skip
    names = {f"vision_model.{name.removeprefix('vision_model.')}": x for name, x in network.state_dict().items()}
    header, end = {}, 0
    for name, tensor in names.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in names.items():
            if not re.search(r"layers\.\d+", name) or re.search(r"layers\.[01]\.", name):
                out.seek(8 + len(text) + header[name]["data_offsets"][0])
                values = torch.randn(tensor.shape, generator=generator).mul(0.02)
                values += float("norm" in name and name.endswith("weight"))
                out.write(values.half().numpy().tobytes())
        out.truncate(8 + len(text) + end)
