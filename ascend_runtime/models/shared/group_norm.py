"""A GroupNorm of a VAE in tiles, whose statistics are those of the whole plane."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.precision import NORMS
from ...parallel.tiles import Tile


class TiledGroupNorm(nn.GroupNorm):
    """nn.GroupNorm over all tiles of a plane, as if they were one tensor.

    Means and variances of the tiles are merged as Chan, Golub and LeVeque (1983) do, in fp64: sums of squares in fp32
    would lose a variance that is small compared to the mean. Exchanges 3 numbers a group, and waits for the device.
    """

    def forward(self, x: Tensor, tile: Tile) -> Tensor:
        """x [B, C, ..., h, w]: what is in this tile."""
        if tile.grid.tiles == 1:
            return super().forward(x)
        groups = x.to(NORMS.dtype).unflatten(1, (self.num_groups, -1)).flatten(2)  # [B, groups, elements]
        variance, mean = torch.var_mean(groups, dim=2, correction=0)
        mean, variance = (each.to(groups)[..., None] for each in merged(mean, variance, groups.shape[2], tile))
        normed = ((groups - mean) * torch.rsqrt(variance + self.eps)).view(x.shape)
        shape = (-1, *[1] * (x.ndim - 2))
        return (normed * self.weight.view(shape) + self.bias.view(shape)).type_as(x)


def merged(mean: Tensor, variance: Tensor, count: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """The mean and variance over all tiles, in fp64 on the CPU. mean, variance: of this tile's `count` elements."""
    mean, variance = mean.cpu().double(), variance.cpu().double()
    counts = torch.full_like(mean, count)
    count, total, squares = tile.summed(torch.stack((counts, count * mean, count * (variance + mean.square()))))
    whole = total / count
    return whole, squares / count - whole.square()
