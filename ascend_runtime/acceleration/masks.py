"""Which mask blocks attend to which: decided from the data of each head alone, so alike on any number of ranks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.sparse import BLOCK, blocks_of
from .bricks import Order

SAMPLES = 64  # queries by which a head's pattern is chosen


def best(query: Tensor, key: Tensor, sparsity: float, protected: Tensor) -> Tensor:
    """[B, heads, blocks, blocks]: each mask block of queries (a row) attends to the ceil(blocks (1 - sparsity)) mask
    blocks of keys whose means match its own best; what is `protected` [blocks] attends to all, and all to that.

    query, key [B, heads, S, head_dim]. Softmax, by which the original ranks them, keeps their order.
    """
    scores = means(query) @ means(key).transpose(-1, -2)
    kept = scores.topk(kept_of(scores.shape[-1], sparsity), dim=-1, sorted=False).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
    return mask | either(protected)


def kept_of(blocks: int, sparsity: float) -> int:
    """How many of a row's mask blocks are kept before what is protected."""
    return max(1, math.ceil(blocks * (1 - sparsity)))


def means(x: Tensor) -> Tensor:
    """[B, heads, S, head_dim] -> of each mask block [B, heads, blocks, head_dim], in fp32."""
    whole = x.shape[2] // BLOCK * BLOCK
    blocks = x[:, :, :whole].unflatten(2, (-1, BLOCK)).mean(3, dtype=torch.float32)
    if whole == x.shape[2]:
        return blocks
    return torch.cat([blocks, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)


def either(protected: Tensor) -> Tensor:
    """[blocks] -> [blocks, blocks]: pairs of which one is protected."""
    return protected[:, None] | protected


def band(blocks: int, sparsity: float, device: torch.device) -> Tensor:
    """[blocks, blocks]: those that lie less than a share of 1 - sqrt(sparsity) of the sequence apart."""
    reach = round(1 - math.sqrt(sparsity), 2) * blocks
    place = torch.arange(blocks, device=device)
    return (place[:, None] - place).abs() <= reach


def recalls(query: Tensor, key: Tensor, orders: tuple[Order, ...], masks: tuple[Tensor, ...]) -> Tensor:
    """[orders, heads]: how much of a head's softmax lies within each mask [blocks, blocks] of its order, on a sample.

    query, key [B, S, heads, head_dim]. Summed over the batch; one head after the other, as its scores are many.
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
    """[...]: the share of the products of a sequence of `length` that a mask [..., blocks, blocks] computes."""
    sizes = torch.full((blocks_of(length),), BLOCK, device=mask.device, dtype=torch.float32)
    sizes[-1] -= len(sizes) * BLOCK - length
    return mask.float() @ sizes @ sizes / length**2
