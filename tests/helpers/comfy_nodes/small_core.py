"""Core ComfyUI's own CLIP and VAE of small files: core's loaders expect the sizes of the published networks, which are
replaced here by those of the file."""

import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock
from comfy_api.latest import io

CATEGORY = "tests"
HUNYUAN = {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}  # of random_hunyuan.vae


class LoadSmallCoreVae(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TestLoadSmallCoreVae", category=CATEGORY, inputs=[io.String.Input("vae_name")],
                         outputs=[io.Vae.Output()])  # fmt: skip

    @classmethod
    def execute(cls, vae_name):
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        nested, plain = comfy.ldm.wan.vae2_2.WanVAE, comfy.sd.AutoencoderKL

        def small_nested(dim, **sizes):
            dims = (tensors["encoder.conv1.weight"].shape[0], tensors["decoder.head.0.gamma"].shape[0])
            return nested(dim=dims[0], dec_dim=dims[1], **sizes)

        comfy.ldm.wan.vae2_2.WanVAE = small_nested
        comfy.sd.AutoencoderKL = lambda ddconfig, **sizes: plain(ddconfig={**ddconfig, **HUNYUAN}, **sizes)
        try:
            vae = comfy.sd.VAE(sd=tensors)
        finally:
            comfy.ldm.wan.vae2_2.WanVAE, comfy.sd.AutoencoderKL = nested, plain
        for module in vae.first_stage_model.modules():
            if isinstance(module, AttnBlock):
                module.optimized_attention = causal
        return io.NodeOutput(vae)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention [B,C,T,H,W] of each frame to itself and earlier ones, as HunyuanVideo's authors and diffusers compute
    it; core lets frames see later ones too."""
    batch, channels, frames, height, width = query.shape
    query, key, value = (x.flatten(2).transpose(1, 2) for x in (query, key, value))
    frame = torch.arange(frames).repeat_interleave(height * width)
    seen = frame[None] <= frame[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], seen)[:, 0]
    return out.transpose(1, 2).reshape(batch, channels, frames, height, width)


NODES = [LoadSmallCoreVae]
