"""Small HunyuanVideo models with random weights, made from a seed.

Every weight is random, norms and biases too, so that two that change places are noticed.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import tiny_models
import torch
from ascend_runtime import Conditioning
from ascend_runtime.models.hunyuan_video.context import Context
from ascend_runtime.models.hunyuan_video.transformer import HunyuanVideoTransformer
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor, nn

TEXT_DIM, POOLED_DIM = 24, 12
KINDS = {  # by name: what is in the transformer's config
    "t2v": {},
    "i2v concat": {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    "i2v replace": {"image_condition_type": "token_replace"},
}
PIPELINES = {"t2v": "HunyuanVideoPipeline"}  # the class of each kind's pipeline; HunyuanVideoImageToVideoPipeline
NARROW = {"num_attention_heads": 4, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6)}
AS_CORE = {"num_attention_heads": 2, "attention_head_dim": 128, "pooled_projection_dim": 768}  # core has no others


def config(kind: str = "t2v", **changes) -> dict:
    """The config of a transformer of KINDS with two blocks of each kind. changes: of its fields, such as AS_CORE."""
    sizes = {"in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2,
             "text_embed_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM, **NARROW}  # fmt: skip
    if changes.get("attention_head_dim", 0) == AS_CORE["attention_head_dim"]:
        sizes["rope_axes_dim"] = (16, 56, 56)
    return {**sizes, **KINDS[kind], **changes}


def transformer(kind: str = "t2v", seed: int = 0, **changes) -> HunyuanVideoTransformer3DModel:
    """diffusers' transformer; see `config`."""
    torch.manual_seed(seed)  # vectors stay near what they begin at, which is random in biases
    return tiny_models.randomise(HunyuanVideoTransformer3DModel(**config(kind, **changes)), seed).eval()


def vae(seed: int = 0) -> AutoencoderKLHunyuanVideo:
    """A VAE of the published form (16 channels, 8 x 8 x 4) and scaling, with few channels."""
    torch.manual_seed(seed)
    network = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    return tiny_models.randomise(network, seed).eval()


def ours(theirs: HunyuanVideoTransformer3DModel) -> HunyuanVideoTransformer:
    """Our network with the parameters of diffusers'."""
    network = HunyuanVideoTransformer(dict(theirs.config))
    network.load_state_dict(parameters_of(theirs.state_dict()), assign=True)
    return network.eval()


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network in another dtype."""
    return nn.Module.to(deepcopy(network), dtype)  # diffusers' own `to` prints warnings that do not apply


def parameters_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, of diffusers' state dict."""
    made = {}
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".proj_out.")
        if not owner:
            made[name] = tensor
        elif kind == "bias":
            made[f"{owner}.proj_out_mlp.bias"] = tensor
        else:
            made[f"{owner}.proj_out_attn.weight"] = tensor[:, : len(tensor)].contiguous()
            made[f"{owner}.proj_out_mlp.weight"] = tensor[:, len(tensor) :].contiguous()
    return made


def diffusers_state(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict, of our parameters."""
    made = {}
    for name, tensor in parameters.items():
        if name.endswith(".proj_out_attn.weight"):
            other = parameters[name.replace("proj_out_attn", "proj_out_mlp")]
            made[name.replace("proj_out_attn", "proj_out")] = torch.cat([tensor, other], 1)
        elif not name.endswith(".proj_out_mlp.weight"):
            made[name.replace("proj_out_mlp", "proj_out")] = tensor
    return made


class Inputs(NamedTuple):
    """Of a pass. latent [B, C, T, H, W], timestep [B], text [B, L, text_embed_dim], pooled [B, pooled_projection_dim],
    guidance [B] or None."""

    latent: Tensor
    timestep: Tensor
    text: Tensor
    pooled: Tensor
    guidance: Tensor | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        """In the blocks' dtype, in which the embedded guidance is rounded; the timestep stays in fp32."""
        guidance = self.guidance
        rounded = None if guidance is None else ((guidance / 1000).to(dtype) * 1000).float()
        return Inputs(self.latent.to(dtype), self.timestep, self.text.to(dtype), self.pooled.to(dtype), rounded)


def inputs(config: dict, shape=(3, 6, 10), text: int = 7, batch: int = 1, seed: int = 1) -> Inputs:
    """Random inputs of a network of this config. shape: frames, height and width of the latent; text: its tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latent = draw(batch, config["in_channels"], *shape)
    timestep = 1000 * torch.rand(batch, generator=generator)
    guidance = torch.full((batch,), 6000.0) if config["guidance_embeds"] else None
    text = draw(batch, text, config["text_embed_dim"])
    return Inputs(latent, timestep, text, draw(batch, config["pooled_projection_dim"]), guidance)


def conditioning(text: int = 7, seed: int = 1) -> Conditioning:
    """Of a random prompt with so many tokens, for models with these widths."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, POOLED_DIM, generator=generator)
    return Conditioning(text=torch.randn(1, text, TEXT_DIM, generator=generator), pooled=pooled)


def velocity(network: HunyuanVideoTransformer, inputs: Inputs, *passing) -> Tensor:
    """What our network makes of them."""
    return network(inputs.latent, inputs.timestep, Context(inputs.text, inputs.pooled, inputs.guidance), *passing)


def diffusers_velocity(network: HunyuanVideoTransformer3DModel, inputs: Inputs) -> Tensor:
    """What diffusers' network makes of them."""
    mask = torch.ones(inputs.text.shape[:2], dtype=torch.bool)
    return network(
        inputs.latent, inputs.timestep, inputs.text, mask, inputs.pooled, inputs.guidance, return_dict=False
    )[0]


def folder(root: Path, kind: str = "t2v", seed: int = 0, **changes) -> Path:
    """A diffusers folder of the transformer and the VAE, without text encoders."""
    transformer(kind, seed, **changes).save_pretrained(root / "transformer")
    vae(seed).save_pretrained(root / "vae")
    index = {
        "_class_name": PIPELINES.get(kind, "HunyuanVideoImageToVideoPipeline"),
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root
