"""Trains the transformer and the text encoder together, on cached latents."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from . import text
from .loop import Stage

FLOW_SHIFT = 3.0
EMPTY_PROMPTS = 0.10  # fraction of prompts that are dropped, for classifier-free guidance
UNIFORM_TIMES = 0.15  # fraction of times that are drawn uniformly instead of logit-normally
# (fraction of the budget, latent frames, clips per step); the VAE is causal, so the first latent frame is an image:
# training on it teaches shape, colour and background at a fifth of the cost
PHASES = ((0.25, 1, 96), (0.38, 3, 32), (1.00, 5, 20))


def build_transformer() -> WanTransformer3DModel:
    """Wan2.1's transformer with 4 heads of 48 (RoPE axes of 16) and 4 blocks; the output starts at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=16,
        out_channels=16,
        text_dim=text.TEXT_DIM,
        freq_dim=128,
        ffn_dim=576,
        num_layers=4,
        cross_attn_norm=True,
    )
    for block in transformer.blocks:  # 500 rows of padding share the attention: large scores let words stand out
        nn.init.constant_(block.attn2.norm_q.weight, 1.75)
        nn.init.constant_(block.attn2.norm_k.weight, 1.75)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def draw_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in 0..1: logit-normal with a uniform fraction, then shifted like in the sampler (SD3, 2024)."""
    sigmas = torch.randn(count, generator=generator).sigmoid()
    even = torch.rand(count, generator=generator)
    sigmas = torch.where(torch.rand(count, generator=generator) < UNIFORM_TIMES, even, sigmas)
    return FLOW_SHIFT * sigmas / (1 + (FLOW_SHIFT - 1) * sigmas)


def build_modules() -> list[nn.Module]:
    """The transformer and the text encoder."""
    return [build_transformer(), text.build_text_encoder(len(text.build_tokenizer()))]


def dit_stage(latents: torch.Tensor, captions: list[str], minutes: float, device: str, lr: float = 4e-3) -> Stage:
    """Flow matching on normalised latents `[N,16,t,h,w]` and their captions; modules: as `build_modules`."""
    transformer, encoder = modules = [module.to(device).train() for module in build_modules()]
    cross_attention = text.use_padded_text(transformer)
    prompts = sorted(set(captions))
    ids, masks = text.tokenize(text.build_tokenizer(), prompts + [""])
    order = {prompt: i for i, prompt in enumerate(prompts)}
    prompt_of = torch.tensor([order[caption] for caption in captions])

    def step(progress: float, generator: torch.Generator) -> torch.Tensor:
        num_frames, batch = next((frames, size) for share, frames, size in PHASES if progress < share)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < EMPTY_PROMPTS
        rows = torch.where(dropped, len(prompts), prompt_of[chosen])
        clean = latents[chosen, :, :num_frames]
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = draw_sigmas(batch, generator)
        level = sigmas.view(-1, 1, 1, 1, 1)
        noisy, target = (1 - level) * clean + level * noise, noise - clean
        embeddings = text.encode_tokens(encoder, ids[rows].to(device), masks[rows].to(device))
        cross_attention.bias = text.padding_bias(masks[rows]).to(device)
        velocity = transformer(noisy.to(device), sigmas.to(device) * 1000, embeddings).sample
        return (velocity - target.to(device)).square().mean()

    adam_names = ("patch_embedding", "proj_out", "shared.weight", "embed_tokens", "relative_attention_bias",
                  "scale_shift_table")  # fmt: skip
    return Stage("dit", modules, step, minutes, lr, adam_names, ema_decay=0.99)
