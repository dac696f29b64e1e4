"""Writes small random HunyuanVideo models in the forms in which other systems publish them, by their own names.

The tensors are those of diffusers' networks (random_hunyuan). The names of the original
(Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/models.py) and of ComfyUI (comfy/ldm/hunyuan_video/model.py;
comfy/ldm/modules/diffusionmodules/model.py) are written out here, apart from the code under test.
"""

import json
import re

import original_formats
import random_hunyuan
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.components import Components
from safetensors.torch import save_file

MASTER = "mp_rank_00_model_states"
OUTSIDE = {  # diffusers' layer: the original's, ComfyUI's
    "x_embedder.proj": ("img_in.proj", "img_in.proj"),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.mlp.0", "time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.mlp.2", "time_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.mlp.0", "guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.mlp.2", "guidance_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", "vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", "vector_in.out_layer"),
    "context_embedder.proj_in": ("txt_in.input_embedder", "txt_in.input_embedder"),
    "context_embedder.time_text_embed.timestep_embedder.linear_1": ("txt_in.t_embedder.mlp.0",
                                                                    "txt_in.t_embedder.in_layer"),
    "context_embedder.time_text_embed.timestep_embedder.linear_2": ("txt_in.t_embedder.mlp.2",
                                                                    "txt_in.t_embedder.out_layer"),
    "context_embedder.time_text_embed.text_embedder.linear_1": ("txt_in.c_embedder.linear_1",
                                                                "txt_in.c_embedder.in_layer"),
    "context_embedder.time_text_embed.text_embedder.linear_2": ("txt_in.c_embedder.linear_2",
                                                                "txt_in.c_embedder.out_layer"),
    "proj_out": ("final_layer.linear", "final_layer.linear"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
}  # fmt: skip
BLOCKS = {  # diffusers' prefix: the others', and the layers in a block; several of diffusers' layers are fused
    "context_embedder.token_refiner.refiner_blocks": ("txt_in.individual_token_refiner.blocks", {
        ("norm1",): ("norm1", "norm1"), ("norm2",): ("norm2", "norm2"),
        ("norm_out.linear",): ("adaLN_modulation.1", "adaLN_modulation.1"),
        ("attn.to_q", "attn.to_k", "attn.to_v"): ("self_attn_qkv", "self_attn.qkv"),
        ("attn.to_out.0",): ("self_attn_proj", "self_attn.proj"),
        ("ff.net.0.proj",): ("mlp.fc1", "mlp.0"), ("ff.net.2",): ("mlp.fc2", "mlp.2"),
    }),
    "transformer_blocks": ("double_blocks", {
        ("norm1.linear",): ("img_mod.linear", "img_mod.lin"),
        ("norm1_context.linear",): ("txt_mod.linear", "txt_mod.lin"),
        ("attn.to_q", "attn.to_k", "attn.to_v"): ("img_attn_qkv", "img_attn.qkv"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): ("txt_attn_qkv", "txt_attn.qkv"),
        ("attn.norm_q",): ("img_attn_q_norm", "img_attn.norm.query_norm"),
        ("attn.norm_k",): ("img_attn_k_norm", "img_attn.norm.key_norm"),
        ("attn.norm_added_q",): ("txt_attn_q_norm", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k",): ("txt_attn_k_norm", "txt_attn.norm.key_norm"),
        ("attn.to_out.0",): ("img_attn_proj", "img_attn.proj"),
        ("attn.to_add_out",): ("txt_attn_proj", "txt_attn.proj"),
        ("ff.net.0.proj",): ("img_mlp.fc1", "img_mlp.0"), ("ff.net.2",): ("img_mlp.fc2", "img_mlp.2"),
        ("ff_context.net.0.proj",): ("txt_mlp.fc1", "txt_mlp.0"), ("ff_context.net.2",): ("txt_mlp.fc2", "txt_mlp.2"),
    }),
    "single_transformer_blocks": ("single_blocks", {
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): ("linear1", "linear1"),
        ("proj_out",): ("linear2", "linear2"),
        ("norm.linear",): ("modulation.linear", "modulation.lin"),
        ("attn.norm_q",): ("q_norm", "norm.query_norm"), ("attn.norm_k",): ("k_norm", "norm.key_norm"),
    }),
}  # fmt: skip
ORIGINAL, COMFYUI = 0, 1


def layers_of(state, system):
    """(diffusers' layers, the layer that holds them in a system: ORIGINAL or COMFYUI), in file order."""
    for own, theirs in OUTSIDE.items():
        if f"{own}.weight" in state:
            yield (own,), theirs[system]
    for prefix, (their_prefix, layers) in BLOCKS.items():
        inside = [name.removeprefix(f"{prefix}.") for name in state if name.startswith(f"{prefix}.")]
        for number in sorted({int(name.split(".")[0]) for name in inside}):
            for own, theirs in layers.items():
                yield tuple(f"{prefix}.{number}.{one}" for one in own), f"{their_prefix}.{number}.{theirs[system]}"


def renamed(state, system=ORIGINAL):
    """The state of diffusers' HunyuanVideoTransformer3DModel by the names of a system."""
    made, left = {}, dict(state)
    for own, theirs in layers_of(state, system):
        for leaf in ("weight", "bias"):
            parts = [left.pop(f"{one}.{leaf}") for one in own if f"{one}.{leaf}" in left]
            if parts:
                scale = theirs.endswith(("query_norm", "key_norm"))
                made[f"{theirs}.{'scale' if scale else leaf}"] = torch.cat(parts)
    assert not left, left.keys()
    for name in [name for name in made if name.startswith("final_layer.adaLN")]:
        scale, shift = made[name].chunk(2)
        made[name] = torch.cat([shift, scale])
    return {name: tensor.contiguous() for name, tensor in made.items()}


def original_transformer(state):
    """A transformer's state by the original's names."""
    return renamed(state, ORIGINAL)


def comfyui_transformer(state):
    """A transformer's state by the names of core ComfyUI's network."""
    return renamed(state, COMFYUI)


def comfyui_vae(state):
    """The state of diffusers' AutoencoderKLHunyuanVideo, which has the original's names, by core ComfyUI's."""
    rules = (
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", r"up.\1.block"), (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    )  # fmt: skip
    made = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.up\.(\d)\.", lambda level: f".up.{3 - int(level[1])}.", name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name):
            tensor = tensor[..., None, None, None]
        made[name] = tensor.clone()
    assert len(made) == len(state)
    return made


def diffusers_transformer(network, tensors):
    """A copy of diffusers' network with these tensors, by the original's names."""
    state, made = network.state_dict(), {}
    for own, theirs in layers_of(state, ORIGINAL):
        for leaf in ("weight", "bias"):
            if f"{own[0]}.{leaf}" in state:
                tensor = tensors[f"{theirs}.{leaf}"].float()
                if theirs.startswith("final_layer.adaLN"):
                    tensor = torch.cat(tensor.chunk(2)[::-1])
                parts = tensor.split([len(state[f"{one}.{leaf}"]) for one in own])
                made |= {f"{one}.{leaf}": part for one, part in zip(own, parts)}
    copy = type(network).from_config(network.config)
    copy.load_state_dict(made)
    return copy.eval()


# Files and folders of a transformer. Each function writes tensors with the original's names.


def original_folder(root, tensors, kind="t2v", fp8=False):
    """The original's folder, hunyuan-video-KIND-720p, in `root`. fp8: with the pair in 8 bits next to it."""
    folder = root / f"hunyuan-video-{kind}-720p" / "transformers"
    folder.mkdir(parents=True)
    torch.save({"module": tensors}, folder / f"{MASTER}.pt")
    if fp8:
        original_fp8(folder, tensors)
    return root


def original_fp8(folder, tensors):
    """The original's pair of files in 8 bits: the linear layers of blocks, and their scales. Returns what the tensors
    are worth (hyvideo/modules/fp8_optimization.py)."""
    blocks = {name for name, x in tensors.items() if name.endswith(".weight") and x.ndim == 2
              and name.startswith(("double_blocks.", "single_blocks."))}  # fmt: skip
    kept, scales = original_formats.in_8_bits({name: tensors[name] for name in blocks})
    torch.save({"module": {**tensors, **kept}}, folder / f"{MASTER}_fp8.pt")
    torch.save(scales, folder / f"{MASTER}_fp8_map.pt")
    return {**tensors, **original_formats.dequantized(kept, scales)}


def original_vae(folder, vae):
    """The original's folder of a VAE, whose names are diffusers'."""
    folder.mkdir(parents=True)
    torch.save({"state_dict": {f"vae.{name}": x for name, x in vae.state_dict().items()}}, folder / "pytorch_model.pt")
    config = {"_class_name": "AutoencoderKLCausal3D", "latent_channels": 16, "time_compression_ratio": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prefixed(prefix):
    return lambda file, tensors: save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)


WRITERS = {
    "one .safetensors": lambda file, tensors: save_file(tensors, file),
    "ComfyUI's prefix": prefixed("model.model."),
    "an older prefix of ComfyUI": prefixed("model.diffusion_model."),
    "FSDP's": lambda file, tensors: save_file(
        {f"module.{name.replace('.img_', '._fsdp_wrapped_module.img_')}": tensor for name, tensor in tensors.items()},
        file,
    ),
    "the original's file": lambda file, tensors: torch.save({"module": tensors}, file),
    "the original's folder": original_folder,
    "a .pt": lambda file, tensors: torch.save(tensors, file),
}
IN_8_BITS = original_formats.IN_8_BITS


# Loaded by ours


def load(path, **spec):
    """Our network of the transformer at a path."""
    spec = {"dtype": "float32", **spec}
    return Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(path), **spec), lambda *_: None).high_noise


@torch.no_grad()
def assert_equals_diffusers(made, theirs, tolerance=1e-5):
    inputs = random_hunyuan.inputs(theirs.config)
    expected = random_hunyuan.diffusers_velocity(theirs, inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(random_hunyuan.velocity(made, inputs), expected, atol=tolerance, rtol=tolerance)


def parameters(made):
    """Those of our network, by diffusers' names."""
    return random_hunyuan.diffusers_state(made.state_dict())


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    assert not [name for name, x in made.items() if not torch.equal(x, expected[name])]
