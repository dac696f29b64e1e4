"""Small Wan checkpoints with random weights, made from a seed in a folder of the test's own.

Only the tokenizer is the embedded model's. Every weight is random, norms and biases too, so that two that change
places are noticed.
"""

import math
import shutil
from pathlib import Path

import torch
from ascend_runtime.engine.sampling import make_scheduler
from ascend_runtime.models.registry import family
from ascend_runtime.models.wan.context import Context
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config
from transformers import UMT5EncoderModel

TOKENIZER = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan" / "tokenizer"
TEXT_DIM = 32
IMAGE_DIM = 40
SEES_IMAGES = {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 96}
IMAGE_MODELS = {  # by name: what is in the transformer's config
    "wan 2.1": SEES_IMAGES,
    "first and last frame": {**SEES_IMAGES, "pos_embed_seq_len": 514},
    "wan 2.2": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}


def wan_transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    """diffusers' transformer, two layers of 96 channels in 4 heads; `changes` go into its config."""
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 160,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    torch.manual_seed(seed)  # vectors stay near what they begin at, which is random in biases
    return randomise(WanTransformer3DModel(**{**config, **changes}), seed).eval()


def velocity(network, latent, timestep, text, image=None) -> torch.Tensor:
    """What our transformer makes of a prompt that it has not seen."""
    return network(latent, timestep, Context(text, image))


def wan_vae(seed: int = 0) -> AutoencoderKLWan:
    """A VAE of the published form (16 channels, 8 x 8 x 4) and of its latent statistics, with 8 base channels."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()


def wan22_vae(
    seed: int = 0, mean=torch.linspace(-0.3, 0.3, 48), std=torch.linspace(0.5, 1.5, 48)
) -> AutoencoderKLWan:
    """A VAE of Wan 2.2's form: 48 channels, 16 x 16 x 4; with 8 base channels, and these latent statistics."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1, z_dim=48, in_channels=12,
        out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16,
        latents_mean=list(map(float, mean)), latents_std=list(map(float, std)),
    ).eval()  # fmt: skip


def clip_vision(seed: int = 0) -> CLIPVisionModel:
    """A CLIP that sees an image of 224 x 224 as 257 tokens, like the real one, with IMAGE_DIM channels."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=14
    )
    torch.manual_seed(seed)
    return CLIPVisionModel(config).eval()


def umt5(seed: int = 0, layers: int = 2, vocabulary: int = 64) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=layers, dropout_rate=0.0
    )
    torch.manual_seed(seed)
    return randomise(UMT5EncoderModel(config), seed).eval()


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter from `seed`: matrices to keep the variance, vectors (norms, biases, tables) near theirs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return model


def wan_pipeline(*, seed: int = 0, experts: int = 1, layers: int = 2, text_layers: int = 2) -> WanPipeline:
    """diffusers' own pipeline of such networks; two experts meet at boundary 0.875."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5(seed, text_layers, len(tokenizer)),
        vae=wan_vae(seed),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=wan_transformer(seed, num_layers=layers),
        transformer_2=wan_transformer(seed + 1, num_layers=layers) if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_pipeline(name: str, seed: int = 0) -> WanImageToVideoPipeline:
    """diffusers' own pipeline of a small model of IMAGE_MODELS; "wan 2.2" has two experts, who meet at 0.9."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    changes = IMAGE_MODELS[name]
    sees, experts = "image_dim" in changes, 2 if name == "wan 2.2" else 1
    pipeline = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5(seed, vocabulary=len(tokenizer)),
        vae=wan22_vae(seed) if name == "ti2v" else wan_vae(seed),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        image_processor=CLIPImageProcessor() if sees else None,
        image_encoder=clip_vision(seed) if sees else None,
        transformer=wan_transformer(seed, **changes),
        transformer_2=wan_transformer(seed + 1, **changes) if experts == 2 else None,
        boundary_ratio=0.9 if experts == 2 else None,
        expand_timesteps=name == "ti2v",
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    """Writes the pipeline as a diffusers folder."""
    pipeline.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    return folder


def denormalised(latent, vae):
    """A latent as a VAE (diffusers') decodes it, of a normalised one."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return latent * std + mean


def hunyuan_vae(seed: int = 0) -> AutoencoderKLHunyuanVideo:
    """A VAE of the published form (16 channels, 8 x 8 x 4), with an eighth of the channels, and one layer a level.
    diffusers makes whole frames of it, of all at once."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 64, 64), layers_per_block=1).eval()
    vae.use_framewise_decoding = vae.use_framewise_encoding = False
    return vae


def on_ranks(vae):
    """A VAE (diffusers') as the ranks use it."""
    known = family("hunyuan_video" if isinstance(vae, AutoencoderKLHunyuanVideo) else "wan")
    return known.vae(vae, known.vae_form(vae.config))


def scheduler(spec):
    """The scheduler of a job of a Wan model."""
    return make_scheduler(spec, family("wan"))
