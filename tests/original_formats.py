"""Writes small random weights in the forms in which other systems publish and train them, by their own names.

The names of the original are written out in random_wan; those of MindSpeed-MM are made here from them, by the table in
its converter (checkpoint/sora_model/wan_converter.py).
"""

import json
import re

import torch
import torch.distributed.checkpoint as dcp
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn
MINDSPEED = (
    (r"attn\.(q|k|v)\.", r"attn.proj_\1."), (r"attn\.o\.", "attn.proj_out."), (r"attn\.norm_(q|k)\.", r"attn.\1_norm."),
    (r"text_embedding\.0", "text_embedding.linear_1"), (r"text_embedding\.2", "text_embedding.linear_2"),
)  # fmt: skip


def diffusers_transformer(tensors, head_dim=128):
    """diffusers' network of tensors with the original's names, through diffusers' own conversion."""
    dim, ffn = tensors["patch_embedding.weight"].shape[0], tensors["blocks.0.ffn.0.weight"].shape[0]
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    network = WanTransformer3DModel(
        num_attention_heads=dim // head_dim, attention_head_dim=head_dim, ffn_dim=ffn, num_layers=layers
    )
    network.load_state_dict(convert_wan_transformer_to_diffusers({k: x.float() for k, x in tensors.items()}))
    return network.eval()


def mindspeed_names(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in MINDSPEED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


# Folders of a transformer. Each function writes tensors with the original's names.


def original_folder(folder, tensors, heads=2):
    """Two shards and the original's config.json."""
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"_class_name": "WanModel", "dim": 128 * heads, "num_heads": heads, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Arguments:
    """As a training system keeps beside its weights; to be read by nobody."""

    def __init__(self):
        self.lr = 1e-5

    def __setstate__(self, _):
        raise AssertionError("code of a checkpoint was run")


def mindspeed_release(folder, tensors, layers_of_stages=(2,)):
    (folder / "release").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    first = 0
    for stage, layers in enumerate(layers_of_stages):
        own, last = {}, stage == len(layers_of_stages) - 1
        for name, tensor in mindspeed_names(tensors).items():
            if block := re.match(r"blocks\.(\d+)\.(.*)", name):
                if first <= int(block[1]) < first + layers:
                    own[f"blocks.{int(block[1]) - first}.{block[2]}"] = tensor
            elif last if name.startswith("head.") else stage == 0:
                own[name] = tensor
        first += layers
        rank = "mp_rank_00" if len(layers_of_stages) == 1 else f"mp_rank_00_{stage:03d}"
        (folder / "release" / rank).mkdir()
        state = {"model": own, "args": Arguments(), "optimizer": {"exp_avg": torch.zeros(3)}, "iteration": 7}
        torch.save(state, folder / "release" / rank / "model_optim_rng.pt")
    return folder


def mindspeed_distributed(folder, tensors):
    """torch's distributed checkpoint of iteration 1000, in which an older one is left."""
    (folder / "iter_0000500").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1000")
    state = {"model": mindspeed_names(tensors), "optimizer": {"exp_avg": torch.zeros(3)}, "iteration": 1000}
    dcp.save(state, checkpoint_id=folder / "iter_0001000", no_dist=True)
    return folder


# 8 bits


def in_8_bits(tensors, dtype=FP8):
    """(8-bit weights of the layers' matrices and all other tensors, their scales by layer)."""
    kept, scales = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            scales[name.removesuffix(".weight")] = scale = tensor.abs().max() / torch.finfo(dtype).max
            tensor = (tensor / scale).to(dtype)
        kept[name] = tensor
    return kept, scales


def dequantized(kept, scales):
    """What the weights are worth."""
    return {name: tensor.float() * scales.get(name.removesuffix(".weight"), torch.tensor(1.0))
            for name, tensor in kept.items()}  # fmt: skip


def save_old_mark(file, kept, scales, prefix=""):
    tensors = kept | {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    tensors |= {f"{layer}.scale_input": torch.ones(()) for layer in scales} | {"scaled_fp8": torch.empty(0, dtype=FP8)}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)


def save_new_mark(file, kept, scales):
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    tensors = kept | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    mark = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, file, metadata={"_quantization_metadata": mark})


def save_layer_marks(file, kept, scales):
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    tensors = kept | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    tensors |= {f"{layer}.input_scale": torch.ones(()) for layer in scales}
    save_file(tensors | {f"{layer}.comfy_quant": mark.clone() for layer in scales}, file)
