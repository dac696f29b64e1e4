"""How HunyuanVideo transformers are conditioned on text and images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shared.conditioning import Branch, Conditioner, Given, Prompt, ready
from .context import Context


@dataclass(frozen=True, eq=False)
class HunyuanBranch(Branch):
    text: Tensor
    pooled: Tensor
    guidance: Tensor | None

    def context(self) -> Context:
        return Context(self.text, self.pooled, self.guidance)

    def input(self, latent: Tensor) -> Tensor:
        return latent

    def timestep(self, timestep: float) -> Tensor:
        return torch.full((len(self.text),), timestep, device=self.text.device)


class HunyuanConditioner(Conditioner):
    empty_latent = "Use EmptyHunyuanLatentVideo."

    def branch(self, prompt: Prompt, given: Given, device: torch.device, dtype: torch.dtype) -> Branch:
        text, pooled = (ready(one, given.batch, device, dtype) for one in (prompt.text, prompt.pooled))
        guidance = None
        if self.config["guidance_embeds"]:
            guidance = (torch.full((given.batch,), 6.0, device=device, dtype=dtype) * 1000).float()
        return HunyuanBranch(text, pooled, guidance)
