"""What of a Toy's prompts reaches its transformer: a text, and one pooled vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ascend_runtime.models.shared.conditioning import Branch, Conditioner, ready
from ascend_runtime.ops.precision import check_finite
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

    def check_prompt(self, name, prompt, given):
        width = self.config["pooled_dim"]
        if prompt.pooled is None or prompt.pooled.ndim != 2 or prompt.pooled.shape[1] != width:
            held = None if prompt.pooled is None else list(prompt.pooled.shape)
            raise ValueError(
                f"The {name} conditioning's pooled vector is {held}; a Toy reads [1, {width}]. Encode the prompt with "
                "the text encoders of the model."
            )
        check_finite(prompt.pooled, f"The {name} conditioning's pooled vector")

    def branch(self, prompt, given, device, dtype):
        return ToyBranch(*(ready(one, given.batch, device, dtype) for one in (prompt.text, prompt.pooled)))
