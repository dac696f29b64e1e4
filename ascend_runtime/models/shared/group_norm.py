"""A GroupNorm of a VAE in chunks of frames and in tiles, whose statistics are those of the whole video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ...ops.vae import channel_parameters, group_moments, normed_by
from ...parallel.mesh import all_gather
from ...parallel.tiles import Tile


class TiledGroupNorm(nn.GroupNorm):
    """nn.GroupNorm over all tiles of a plane, as if they were one tensor."""

    def forward(self, x: Tensor, tile: Tile) -> Tensor:
        """x [B, C, ..., h, w]: what is in this tile."""
        if tile.grid.tiles == 1:
            return super().forward(x)
        moments = over_plane(group_moments(x, self.num_groups), tile)
        each = [channel_parameters(own, self.weight, self.bias) for own in moments.split(1, dim=1)]
        return torch.cat([normed_by(one, parameters, self.eps) for one, parameters in zip(x.split(1), each)])


def normed_over(norm: nn.GroupNorm, chunks: Iterable[Tensor], tile: Tile) -> Callable[[Tensor], Tensor]:
    """The norm of one chunk [1, C, t, h, w] of a tile by the statistics of all chunks and tiles. Reads each chunk once.

    Collective over the ranks with a tile: each sends 2 numbers a group. Nothing waits for the device.
    """
    parts, counts = [], []
    for chunk in chunks:
        parts.append(group_moments(chunk, norm.num_groups))
        counts.append(chunk[0, 0].numel())
    moments = over_plane(merged(torch.stack(parts), counts), tile)
    parameters = channel_parameters(moments, norm.weight, norm.bias)
    return lambda x: normed_by(x, parameters, norm.eps)


def over_plane(moments: Tensor, tile: Tile) -> Tensor:
    """The moments [2, B, groups] of the whole plane; moments: of this tile. Collective over all tiles of the grid."""
    if tile.grid.tiles == 1:
        return moments
    return merged(all_gather(moments, tile.group), tile.grid.sizes)


def merged(moments: Tensor, counts: Sequence[int]) -> Tensor:
    """The moments [2, B, groups] of all parts together; moments: of each, [parts, 2, B, groups], in proportion to
    `counts` of elements.

    As Chan, Golub and LeVeque (1983) merge them: a sum of squares in fp32 would lose a variance that is small compared
    to the mean.
    """
    share = torch.empty(len(counts), 1, 1, dtype=moments.dtype, device=moments.device)
    start = 0
    for count, equal in groupby(counts):  # filled on the device: a copy from the host would wait for it
        stop = start + len(list(equal))
        share[start:stop].fill_(count / sum(counts))
        start = stop
    mean, variance = moments.unbind(1)
    whole = (share * mean).sum(0)
    return torch.stack((whole, (share * (variance + (mean - whole).square())).sum(0)))
