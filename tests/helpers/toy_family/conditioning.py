"""What of a Toy's prompts reaches its transformer: a text, and one pooled vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ascend_runtime.models.shared.conditioning import Branch, Conditioner, ready
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ToyBranch(Branch):
    text: Tensor
    pooled: Tensor

    def context(self):
        return self.text, self.pooled

    def input(self, latent):
        return latent

    def timestep(self, timestep):
        return torch.full((len(self.text),), timestep, device=self.text.device)


class ToyConditioner(Conditioner):
    empty_latent = "Use EmptyHunyuanLatentVideo."

    def branch(self, prompt, given, device, dtype):
        return ToyBranch(*(ready(one, given.batch, device, dtype) for one in (prompt.text, prompt.pooled)))
