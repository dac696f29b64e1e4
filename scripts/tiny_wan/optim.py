"""Muon for matrices, AdamW for the rest, behind one object; and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximates the nearest semi-orthogonal matrix by Muon's quintic Newton-Schulz iteration (Jordan et al., 2024).

    Iterated on the small Gram matrix; the long side is touched twice instead of at every step.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = identity
    for _ in range(steps):
        polynomial = a * identity + b * gram + c * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    wide = factor @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for weights of two or more dims (convolutions are flattened to out x rest).

    `torch.optim.Muon` does not support convolutions and needs torch 2.9. The update is scaled to AdamW's usual size
    (Liu et al., 2025, "Muon is scalable for LLM training"), so one learning rate works for both.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                matrix = param.grad.lerp(buffer, group["momentum"]).flatten(1)  # Nesterov
                update = orthogonalise(matrix) * (0.2 * max(matrix.shape) ** 0.5)
                param.add_(update.view_as(param), alpha=-group["lr"])


def build_optimizers(modules: list[nn.Module], lr: float, adam_names: tuple[str, ...]) -> list[torch.optim.Optimizer]:
    """Muon for hidden weights; AdamW for vectors and for parameters with one of `adam_names` in their name (embeddings,
    heads)."""
    matrices, rest = [], []
    for module in modules:
        for name, param in module.named_parameters():
            is_matrix = param.ndim >= 2 and min(param.flatten(1).shape) > 3
            (rest if not is_matrix or any(part in name for part in adam_names) else matrices).append(param)
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(progress: float, peak: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine to `floor` x peak; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * (progress + 1e-3) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    return peak * (floor + (1 - floor) * cosine)
