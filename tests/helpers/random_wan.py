"""Random checkpoints for ComfyUI's model folders, in the forms that its users have."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import original_formats
import tiny_models
import torch
from scripts.lib.comfy_server import COMFYUI
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

TEXT_DIM = 4096  # of UMT5-XXL; core ComfyUI's Wan has no other
HEAD_DIM = 128  # core's Wan has no other
IMAGE_DIM = 1280  # of CLIP; core's Wan has no other
DIM, FFN = 2 * HEAD_DIM, 512


def original_transformer(
    file: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    channels: int = 16,
    out_channels: int = 16,
    image: bool = False,
    places: int = 0,
    reference: bool = False,
) -> Path:
    """A transformer in one .safetensors file with the original's parameter names, fp32.

    channels: that it reads; out_channels: that it makes. image: it looks at one through CLIP, as models of Wan 2.1 do;
    places: for tokens of two images. reference: it has a layer for a reference image, as Fun Control models do.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = _original_shapes(DIM, layers, channels, out_channels)
    if image:
        shapes |= _image_shapes(DIM, layers)
    if places:
        shapes |= {"img_emb.emb_pos": (1, places, IMAGE_DIM)}
    if reference:
        shapes |= {"ref_conv.weight": (DIM, out_channels, 2, 2), "ref_conv.bias": (DIM,)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: _random(name, shape, generator) for name, shape in shapes.items()}, file)
    return file


def ti2v(file: Path, folder: Path) -> None:
    """A transformer of 48 channels in one file, and as diffusers keeps it, in a folder with a VAE of core's figures."""
    original_transformer(file, channels=48, out_channels=48)
    network = WanTransformer3DModel(
        num_attention_heads=DIM // HEAD_DIM, attention_head_dim=HEAD_DIM, ffn_dim=FFN, num_layers=2, text_dim=TEXT_DIM,
        in_channels=48, out_channels=48,
    )  # fmt: skip
    network.load_state_dict(convert_wan_transformer_to_diffusers(load_file(file)))
    network.save_pretrained(as_pipeline(folder) / "transformer")
    figures = core_latent_format("Wan22")
    mean, std = (values.flatten().tolist() for values in (figures.latents_mean, figures.latents_std))
    tiny_models.wan22_vae(mean=mean, std=std).save_pretrained(folder / "vae")


def core_latent_format(name: str):
    """One of core ComfyUI's latent formats. Its module imports at most `comfy`'s small ones, so this process can."""
    sys.path.append(str(COMFYUI))  # last and only here: its other names, such as `nodes`, must not be found
    try:
        return getattr(importlib.import_module("comfy.latent_formats"), name)()
    finally:
        sys.path.remove(str(COMFYUI))


def heavy_transformer(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with a transformer alone, which weighs 101 MB and takes the small models' text."""
    tiny_models.wan_transformer(seed, ffn_dim=65536).save_pretrained(folder / "transformer")
    return as_pipeline(folder)


def wide_text_encoder(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with a UMT5 of one layer that is as wide as the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tiny_models.TOKENIZER, folder / "tokenizer")
    words = len(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    config = UMT5Config(vocab_size=words, d_model=TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=1)
    tiny_models.randomise(UMT5EncoderModel(config), seed).save_pretrained(folder / "text_encoder")
    return as_pipeline(folder)


def single_files(models: Path, seed: int = 0) -> None:
    """Into ComfyUI's folders: the original's folder of a transformer, a text encoder's file, a VAE's .pth."""
    tensors = load_file(original_transformer(models / "diffusion_models" / "written_anew.safetensors", seed=seed))
    original_formats.original_folder(models / "diffusers" / "original_folder", tensors)
    config = UMT5Config(vocab_size=40, d_model=TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=1)
    encoder = tiny_models.randomise(UMT5EncoderModel(config), seed)
    for kind in ("text_encoders", "vae"):
        (models / kind).mkdir()
    tensors = original_formats.comfyui_umt5(encoder, original_formats.sentencepiece_model(), torch.float16)
    save_file(tensors, models / "text_encoders" / "umt5.safetensors")
    vae = tiny_models.randomise(AutoencoderKLWan(base_dim=4), seed)
    torch.save(original_formats.original_vae(vae), models / "vae" / "wan_vae.pth")


def as_pipeline(folder: Path) -> Path:
    """Makes of a folder one that ComfyUI's users may choose from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def _linear(name: str, out: int, into: int) -> dict[str, tuple]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _image_shapes(dim: int, layers: int) -> dict[str, tuple]:
    """What a model that looks at an image has beside the others' parameters."""
    shapes = _linear("img_emb.proj.1", IMAGE_DIM, IMAGE_DIM) | _linear("img_emb.proj.3", dim, IMAGE_DIM)
    for norm, width in (("img_emb.proj.0", IMAGE_DIM), ("img_emb.proj.4", dim)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for index in range(layers):
        attention = f"blocks.{index}.cross_attn"
        shapes |= _linear(f"{attention}.k_img", dim, dim) | _linear(f"{attention}.v_img", dim, dim)
        shapes |= {f"{attention}.norm_k_img.weight": (dim,)}
    return shapes


def _original_shapes(dim: int, layers: int, channels: int, out_channels: int, freq: int = 256) -> dict[str, tuple]:
    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes |= _linear("text_embedding.0", dim, TEXT_DIM) | _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", dim, freq) | _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", 6 * dim, dim)
    shapes |= _linear("head.head", 4 * out_channels, dim) | {"head.modulation": (1, 2, dim)}
    for index in range(layers):
        block = f"blocks.{index}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= _linear(f"{block}.{attention}.{part}", dim, dim)
            shapes |= {f"{block}.{attention}.norm_{part}.weight": (dim,) for part in "qk"}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,), f"{block}.modulation": (1, 6, dim)}
        shapes |= _linear(f"{block}.ffn.0", FFN, dim) | _linear(f"{block}.ffn.2", dim, FFN)
    return shapes


def _random(name: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """Matrices keep the variance of what goes in; biases are small, norms near one, modulation neither."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("modulation"):
        return 0.3 * noise
    return 0.1 * noise if len(shape) == 1 else noise / math.sqrt(math.prod(shape[1:]))
