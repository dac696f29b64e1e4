"""Small Wan checkpoints with random weights, made from a seed in a folder of the test's own.

Only the tokenizer is the embedded model's. Every weight is random, norms and biases too, so that two that change
places are noticed.
"""

import math
import shutil
from pathlib import Path

import torch
from ascend_runtime.families.context import Context
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "tiny_wan" / "tokenizer"
TEXT_DIM = 32


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


def save(pipeline: WanPipeline, folder: Path) -> Path:
    """Writes the pipeline as a diffusers folder."""
    pipeline.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    return folder
