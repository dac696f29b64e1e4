"""The tiny Wan VAE, and its forward on whole clips.

diffusers runs a Wan VAE chunk by chunk with caches. For training, running the same causal network on the whole clip is
faster and gives the same result (tests/models/test_tiny_wan.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample


def build_vae() -> AutoencoderKLWan:
    """Wan2.1's VAE with base width 16 and one residual block per level: 16 channels, 8 x 8 x 4 compression."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latent means `[B,16,t,h,w]` of clips `[B,3,T,H,W]`, T = 4t - 3, not normalised."""
    encoder = vae.encoder
    x = encoder.conv_in(clips)
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x).chunk(2, dim=1)[0]


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips `[B,3,T,H,W]` of latents `[B,16,t,h,w]` (not normalised), not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for layer in block.upsamplers or ():
            x = _resample(layer, x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def _resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """The first frame stays single in time; the others are merged in pairs (down) or split in two (up)."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B,2,C,T,H,W]
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    x = layer(x)  # without caches: only the spatial half
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


class SingleFrameFastConv(WanCausalConv3d):
    """The same convolution; a single frame only meets the kernel's last slice in time, so a 2D convolution suffices."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] > 1 or cache_x is not None or self.stride != (1, 1, 1):
            return super().forward(x, cache_x)
        left, _, top, _, _, _ = self._padding
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(top, left)).unsqueeze(2)


def use_single_frame_fast_conv(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Replaces the classes of the causal convolutions; weights and names do not change."""
    for module in vae.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = SingleFrameFastConv
    return vae
