"""Normalises latents, and makes preview pictures of them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..latent_format import LatentFormat


class Latents:
    """mean, std [1,C,1,1,1], fp32, on the CPU."""

    def __init__(self, format: LatentFormat):
        self.format = format
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (format.mean, format.std))

    def normalised(self, latent: Tensor) -> Tensor:
        """A latent [B,C,T,H,W] as a network reads it."""
        return (latent - self.mean) / self.std

    def restored(self, latent: Tensor) -> Tensor:
        """A latent [B,C,T,H,W] as VAEs and core ComfyUI take it."""
        return latent * self.std + self.mean

    @property
    def has_picture(self) -> bool:
        return self.format.rgb is not None

    def picture(self, latent: Tensor) -> Tensor:
        """A preview, uint8 [H,W,3], of the middle frame of a normalised latent [B,C,T,H,W]."""
        frame = latent[0, :, latent.shape[2] // 2]  # [C,H,W]
        rgb = frame.movedim(0, -1) @ self._rgb + self._bias
        return rgb.add(1).mul(127.5).clamp(0, 255).to(torch.uint8)

    @cached_property
    def _rgb(self) -> Tensor:
        """[C,3]"""
        return torch.tensor(self.format.rgb)

    @cached_property
    def _bias(self) -> Tensor:
        return torch.tensor(self.format.rgb_bias)
