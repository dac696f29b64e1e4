"""Random LoRAs for small Wan transformers, in each layout, and what each must make of a weight, by its own formula."""

import itertools
import math
from pathlib import Path

import random_lycoris
import torch
from safetensors.torch import load_file, save_file

RANK = 4
# What the original and diffusers call the layers that LoRAs change, in a block and outside.
IN_A_BLOCK = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
CONVOLUTION = ("patch_embedding", "patch_embedding")
# What has whole differences beside or instead of pairs: (key, parameter).
DIFFERENCES = {
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.1.cross_attn.o.diff_b": "blocks.1.attn2.to_out.0.bias",
    "blocks.1.ffn.0.diff_b": "blocks.1.ffn.net.0.proj.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
    "blocks.0.norm3.diff": "blocks.0.norm2.weight", "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
    "blocks.1.modulation.diff": "blocks.1.scale_shift_table", "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "text_embedding.2.diff": "condition_embedder.text_embedder.linear_2.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
}  # fmt: skip
LAYOUTS = {  # prefix, whose names, down, up, whether there is an alpha
    "diffusers": ("transformer.", "diffusers", "lora_A.weight", "lora_B.weight", False),
    "no prefix": ("", "diffusers", "lora_A.weight", "lora_B.weight", False),
    "peft": ("base_model.model.", "diffusers", "lora_A.default.weight", "lora_B.default.weight", False),
    "older diffusers": ("transformer.", "diffusers", "lora.down.weight", "lora.up.weight", False),
    "original": ("diffusion_model.", "original", "lora_A.weight", "lora_B.weight", False),
    "kohya": ("lora_unet_", "flat", "lora_down.weight", "lora_up.weight", True),
    "wan fun": ("lora_unet__", "flat", "lora_down.weight", "lora_up.weight", True),
    "lightx2v": ("diffusion_model.", "original", "lora_down.weight", "lora_up.weight", True),
    "lycoris": ("lycoris_", "flat", None, None, True),
    "dora": ("diffusion_model.", "original", "lora_down.weight", "lora_up.weight", True),
}
MAGNITUDES = ("outputs", "inputs", "peft")  # of DoRA


def save(file: Path, layout: str, parameters: dict[str, torch.Tensor], *, seed: int, dtype=torch.float32, alpha=True):
    """Writes a LoRA for a transformer with these parameters, by diffusers' names.

    Returns what it adds to each at strength 1, in fp32. alpha: whether it has the layout's alphas.
    """
    prefix, names, down_key, up_key, has_alpha = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    forms, magnitudes = itertools.cycle(random_lycoris.MATRICES), itertools.cycle(MAGNITUDES)
    for original, diffusers in _layers(parameters).items():
        name = {"diffusers": diffusers, "original": original, "flat": original.replace(".", "_")}[names]
        weight = parameters[f"{diffusers}.weight"]
        if layout == "lycoris":
            form = "loha tucker" if weight.ndim > 2 else next(forms)
            made, adds = random_lycoris.tensors(form, tuple(weight.shape), generator, alpha=2.0 if alpha else None)
            tensors |= {f"{prefix}{name}.{end}": tensor.to(dtype) for end, tensor in made.items()}
            added[f"{diffusers}.weight"] = adds
            continue
        down = torch.randn(RANK, *weight.shape[1:], generator=generator).mul(0.2).to(dtype)
        up = torch.randn(weight.shape[0], RANK, *(1 for _ in weight.shape[2:]), generator=generator)
        up = up.mul(2 / math.sqrt(weight[0].numel())).to(dtype)
        tensors[f"{prefix}{name}.{down_key}"], tensors[f"{prefix}{name}.{up_key}"] = down, up
        product = up.float().view(-1, RANK) @ down.float().view(RANK, -1)
        if has_alpha and alpha:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(RANK / 2)
            product = 0.5 * product
        added[f"{diffusers}.weight"] = product.view_as(weight)
        if layout == "dora":
            kind = next(magnitudes)
            end, magnitude, adds = decomposed(weight.float(), product.view_as(weight), kind, generator)
            tensors[f"{prefix}{name}.{end}"], added[f"{diffusers}.weight"] = magnitude, adds
    for key, parameter in DIFFERENCES.items() if layout == "lightx2v" else ():
        difference = torch.randn(parameters[parameter].shape, generator=generator).mul(0.1).to(dtype)
        tensors[prefix + key] = difference
        added[parameter] = difference.float()
    save_file(tensors, file)
    return added


def decomposed(weight, change, kind, generator):
    """(the end of a key, a random magnitude, what DoRA adds at strength 1). kind: one of MAGNITUDES. The norms are
    those of the rows of W ("outputs", as in ComfyUI) or of W + change ("peft"), or of the columns of W + change."""
    dims = [dim for dim in range(weight.ndim) if dim != (1 if kind == "inputs" else 0)]
    norms = torch.linalg.vector_norm(weight if kind == "outputs" else weight + change, dim=dims, keepdim=True)
    magnitude = norms * (0.7 + 0.6 * torch.rand(norms.shape, generator=generator))
    added = magnitude / norms * (weight + change) - weight
    return ("lora_magnitude_vector", magnitude.flatten(), added) if kind == "peft" else ("dora_scale", magnitude, added)


def merge(base: Path, merged: Path, *added: tuple[float, dict[str, torch.Tensor]], dtype=torch.float32) -> None:
    """Writes the weights `base` with (strength, what a LoRA adds) merged: the sum in fp32, then `dtype`."""
    weights = load_file(base)
    for name in weights:
        total = weights[name].to(dtype).float()
        for strength, differences in added:
            if name in differences:
                total += strength * differences[name]
        if any(name in differences for _, differences in added):
            weights[name] = total.to(dtype)
    save_file(weights, merged)


def _layers(parameters: dict[str, torch.Tensor]) -> dict[str, str]:
    blocks = sorted({int(name.split(".")[1]) for name in parameters if name.startswith("blocks.")})
    layers = {f"blocks.{i}.{o}": f"blocks.{i}.{d}" for i in blocks for o, d in IN_A_BLOCK.items()}
    return layers | OUTSIDE | dict([CONVOLUTION])
