"""Random LoRAs for small HunyuanVideo transformers, in each layout, and what each must make of a weight, by its own
formula."""

import hunyuan_formats as formats
import torch
from safetensors.torch import save_file

RANK, ALPHA = 3, 6.0
LAYOUTS = {  # prefix, whose names, whether dots are underscores, down, up, whether there is an alpha
    "diffusers": ("transformer.", None, False, "lora_A.weight", "lora_B.weight", False),
    "PEFT": ("base_model.model.", None, False, "lora_A.default.weight", "lora_B.default.weight", False),
    "OneTrainer": ("lora_transformer_", None, True, "lora_down.weight", "lora_up.weight", True),
    "OneTrainer, original's names": ("transformer.", "numbered", False, "lora_down.weight", "lora_up.weight", True),
    "diffusion-pipe": ("transformer.", formats.ORIGINAL, False, "lora_A.weight", "lora_B.weight", False),
    "the original's names": ("diffusion_model.", formats.ORIGINAL, False, "lora_down.weight", "lora_up.weight", True),
    "musubi-tuner": ("lora_unet_", formats.ORIGINAL, True, "lora_down.weight", "lora_up.weight", True),
    "HunyuanVideo-I2V": ("Hunyuan_video_I2V_lora_", formats.ORIGINAL, True, "lora_down.weight", "lora_up.weight", True),
    "ComfyUI": ("diffusion_model.", formats.COMFYUI, False, "lora_down.weight", "lora_up.weight", True),
}
IN_BLOCKS, ATTENTIONS = ("transformer_blocks.", "refiner_blocks."), (".to_q", ".to_out.0", ".add_q_proj", ".to_add_out")
# The layers of each layout that core ComfyUI knows, too: part of diffusers' name. It leaves out others.
KNOWN_TO_CORE = {"diffusion-pipe": IN_BLOCKS, "musubi-tuner": ATTENTIONS, "ComfyUI": ("",)}


def save(file, layout, state, seed=0, keep=lambda layer: True):
    """Writes pairs for the matrices of diffusers' state, and differences of biases. Returns what they add to it at
    strength 1. keep: which layers, by diffusers' name of the first of those that a file's layer holds."""
    prefix, system, flat, down_key, up_key, has_alpha = LAYOUTS[layout]
    generator, held, added = torch.Generator().manual_seed(seed), {}, {}
    for own, layer in _layers(state, system):
        weights = [state[f"{one}.weight"] for one in own]
        if weights[0].ndim != 2 or not keep(own[0]):
            continue
        down, up = torch.randn(RANK, weights[0].shape[1], generator=generator), torch.randn(
            sum(map(len, weights)), RANK, generator=generator)  # fmt: skip
        key = prefix + (layer.replace(".", "_") if flat else layer)
        held |= {f"{key}.{down_key}": 0.1 * down, f"{key}.{up_key}": 0.1 * up}
        product = (0.1 * up) @ (0.1 * down)
        if has_alpha:
            held[f"{key}.alpha"] = torch.tensor(ALPHA)
            product = ALPHA / RANK * product
        parts = product.split([len(weight) for weight in weights])
        if system is not None and own == ("norm_out.linear",):
            parts = (torch.cat(product.chunk(2)[::-1]),)
        added |= {f"{one}.weight": part for one, part in zip(own, parts)}
    save_file(held, file)
    return added


def _layers(state, system):
    if system == "numbered":
        for own, layer in formats.layers_of(state, formats.ORIGINAL):
            layer = layer.replace("mlp.fc1", "mlp.fc0")
            yield from [(own, layer)] if len(own) == 1 else (
                ((one,), f"{layer}.{number}") for number, one in enumerate(own))  # fmt: skip
    elif system is not None:
        yield from formats.layers_of(state, system)
    else:
        yield from (((layer,), layer) for layer in dict.fromkeys(name.rpartition(".")[0] for name in state))
