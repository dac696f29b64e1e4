"""Block masks of sparse attention. Each depends only on its own head, so any number of ranks computes the same."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.sparse import BLOCK, blocks_of
from .bricks import Order

SAMPLES = 64  # sampled queries per head, from which RainFusion v1 chooses a pattern


def best(query: Tensor, key: Tensor, sparsity: float, protected: Tensor) -> Tensor:
    """The mask [B, heads, blocks, blocks] in which each query block (a row) attends to the ceil(blocks (1 - sparsity))
    key blocks with the highest product of mean query and mean key. `protected` [blocks] attend to all, and all to them.

    query, key [B, heads, S, head_dim]. The original ranks softmax values, which have the same order.
    """
    scores = means(query) @ means(key).transpose(-1, -2)
    kept = scores.topk(kept_of(scores.shape[-1], sparsity), dim=-1, sorted=False).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
    return mask | either(protected)


def kept_of(blocks: int, sparsity: float) -> int:
    """The number of mask blocks kept per row, without the protected ones."""
    return max(1, math.ceil(blocks * (1 - sparsity)))


def means(x: Tensor) -> Tensor:
    """[B, heads, S, head_dim] -> the mean of each mask block, [B, heads, blocks, head_dim] in fp32."""
    whole = x.shape[2] // BLOCK * BLOCK
    blocks = x[:, :, :whole].unflatten(2, (-1, BLOCK)).mean(3, dtype=torch.float32)
    if whole == x.shape[2]:
        return blocks
    return torch.cat([blocks, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)


def either(protected: Tensor) -> Tensor:
    """[blocks] -> [blocks, blocks]: the pairs in which at least one block is protected."""
    return protected[:, None] | protected


def band(blocks: int, sparsity: float, device: torch.device) -> Tensor:
    """The band mask [blocks, blocks]: pairs at most a fraction 1 - sqrt(sparsity) of the sequence apart."""
    reach = round(1 - math.sqrt(sparsity), 2) * blocks
    place = torch.arange(blocks, device=device)
    return (place[:, None] - place).abs() <= reach


def recalls(query: Tensor, key: Tensor, orders: tuple[Order, ...], masks: tuple[Tensor, ...]) -> Tensor:
    """The softmax weight [orders, heads] that each mask [blocks, blocks] covers in its order, on sampled queries.

    query, key [B, S, heads, head_dim]. Summed over the batch. Computed head by head to limit memory.
    """
    length = query.shape[1]
    rows = torch.linspace(0, length - 1, min(SAMPLES, length), device=query.device).round().long()
    blocks = [order.places // BLOCK for order in orders]
    within = torch.stack([mask[at[rows]][:, at] for at, mask in zip(blocks, masks)]).flatten(1).float()
    found = []
    for head in range(query.shape[2]):
        scores = query[:, rows, head].float() @ key[:, :, head].float().transpose(-1, -2)
        found.append(within @ F.softmax(scores * query.shape[-1] ** -0.5, -1).sum(0).flatten())
    return torch.stack(found, 1)


def density(mask: Tensor, length: int) -> Tensor:
    """The fraction [...] of the attention matrix of `length` x `length` that a mask [..., blocks, blocks] computes."""
    sizes = torch.full((blocks_of(length),), BLOCK, device=mask.device, dtype=torch.float32)
    sizes[-1] -= len(sizes) * BLOCK - length
    return mask.float() @ sizes @ sizes / length**2
