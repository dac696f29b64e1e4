"""Core ComfyUI's own CLIP and VAE of small files: core's loaders expect the sizes of the published networks, which are
replaced here by those of the file."""

import json
from types import SimpleNamespace

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.clip_vision import Output
from comfy.ldm.modules.diffusionmodules.model import AttnBlock
from comfy.text_encoders import hunyuan_video, wan
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


TEXT_MODELS = {  # by core's type: classes of the model and of the tokenizer
    "wan": (wan.te(), wan.WanT5Tokenizer),
    "hunyuan_video": (hunyuan_video.hunyuan_video_clip(), hunyuan_video.HunyuanVideoTokenizer),
}


class LoadSmallCoreClip(io.ComfyNode):
    """names: of files, one a line. sizes: JSON, the configs of core's networks by core's name of the encoder."""

    @classmethod
    def define_schema(cls):
        inputs = [io.String.Input("names"), io.String.Input("type"), io.String.Input("sizes")]
        return io.Schema("TestLoadSmallCoreClip", category=CATEGORY, inputs=inputs, outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, names, type, sizes):
        files = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names.splitlines()]
        states = [comfy.utils.load_torch_file(file, safe_load=True) for file in files]
        model, tokenizer = TEXT_MODELS[type]
        options = {f"{name}_model_config": config for name, config in json.loads(sizes).items()}
        clip = comfy.sd.CLIP(
            SimpleNamespace(params={}, clip=model, tokenizer=tokenizer),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            tokenizer_data={"spiece_model": states[0].get("spiece_model")},
            model_options=options,
        )
        for state in states:
            missing, _ = clip.load_sd(state)
            assert all(name.endswith(("text_projection.weight", "logit_scale")) for name in missing), missing
        return io.NodeOutput(clip)


class ImageTokens(io.ComfyNode):
    """What core's CLIP Vision Encode makes of an image, as far as TextEncodeHunyuanVideo_ImageToVideo reads it."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("tokens"), io.Int.Input("width")]
        return io.Schema("TestImageTokens", category=CATEGORY, inputs=inputs, outputs=[io.ClipVisionOutput.Output()])

    @classmethod
    def execute(cls, tokens, width):
        output = Output()
        output.mm_projected = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(4))
        return io.NodeOutput(output)


class EncodeRaw(io.ComfyNode):
    """As encode nodes of other packs: with word ids, each text model's encoder by its name, and pooled vectors."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Clip.Input("clip"), io.String.Input("text")]
        return io.Schema("TestEncodeRaw", category=CATEGORY, inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, clip, text):
        clip = clip.clone()
        tokens = clip.tokenize(text, return_word_ids=True)
        made = {}
        for name, texts in tokens.items():
            attribute = next(one for one in (f"clip_{name}", name) if hasattr(clip.cond_stage_model, one))
            encoder = getattr(clip.cond_stage_model, attribute)
            made[name] = encoder.encode_token_weights([[(token, weight) for token, weight, _ in one] for one in texts])
        cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        extras = {f"{name} text": one[0] for name, one in made.items()}
        return io.NodeOutput([[cond, {"pooled_output": pooled, **extras}]])


class ClipLora(io.ComfyNode):
    """Load LoRA with a file that changes a layer of the text encoder, by core's functions."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Clip.Input("clip"), io.String.Input("layer"), io.Float.Input("strength")]
        return io.Schema("TestClipLora", category=CATEGORY, inputs=inputs, outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, clip, layer, strength):
        name = f"text_encoders.umt5xxl.transformer.{layer}"
        lora = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
        return io.NodeOutput(comfy.sd.load_lora_for_models(None, clip, lora, 1.0, strength)[1])


class Facts(io.ComfyNode):
    """What nodes read of a VAE besides its work, and what they read that only a network here has."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestVaeFacts", category=CATEGORY, is_output_node=True, inputs=[io.Vae.Input("vae")])

    @classmethod
    def execute(cls, vae):
        vae.throw_exception_if_invalid()
        pixels = torch.rand(7, 75, 82, 3)
        facts = {
            "channels": [vae.latent_channels, vae.latent_dim, vae.output_channels],
            "compression": [vae.spacial_compression_encode(), vae.spacial_compression_decode(),
                            vae.temporal_compression_decode()],
            "ratios": [*vae.downscale_ratio[1:], *vae.upscale_ratio[1:]],
            "frames": [[vae.downscale_ratio[0](count), vae.upscale_ratio[0](count)] for count in range(12)],
            "formulas": [vae.downscale_index_formula, vae.upscale_index_formula],
            "cropped": list(vae.vae_encode_crop_pixels(pixels).shape),
            "values": [vae.process_input(pixels[:1, :1, :1]).flatten().tolist() == (2 * pixels[0, 0, 0] - 1).tolist(),
                       vae.process_output(torch.tensor([-2.0, 0.0, 1.0])).tolist()],
            "kinds": [vae.not_video, vae.crop_input, vae.extra_1d_channel, isinstance(vae, comfy.sd.VAE)],
        }  # fmt: skip
        comfy.model_management.load_models_gpu([vae.patcher.clone()])
        missing = {}
        for name in ("decoder", "encoder.conv1"):
            try:
                facts[name] = bool(vae.first_stage_model.get_submodule(name))
            except AttributeError as error:
                missing[name] = str(error)
        return io.NodeOutput(ui={"facts": [facts], "missing": [missing]})


NODES = [LoadSmallCoreVae, LoadSmallCoreClip, ImageTokens, EncodeRaw, ClipLora, Facts]
