"""Orders of a video's tokens in which 128 consecutive tokens, a mask block, are close to each other in the video.

Every grid is covered: tokens that do not fill a brick or a tile are appended, and the last mask block may be short.
The first latent frame is protected: mask blocks that contain any of its tokens attend to all blocks, and all blocks
attend to them. Text tokens that follow the video's in the sequence are protected too; with cross-attention to a text,
which is not sparse, the sequence has none.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..hardware import devices
from ..ops.sparse import BLOCK, blocks_of

SIDE = 8  # height and width of a brick or a tile, in tokens
DEPTH = BLOCK // SIDE**2  # frames per brick

TokenGrid = tuple[int, int, int]  # a video's tokens: (frames, rows, columns)
CPU = torch.device("cpu")


class Order(NamedTuple):
    """A permutation of a video's tokens, and of the text tokens that follow them.

    tokens [S]: for each place in this order, the token's index in (frame, row, column) order. places [S]: the inverse.
    protected [blocks]: which mask blocks contain tokens of the first frame or of the text.
    """

    tokens: Tensor
    places: Tensor
    protected: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """[B, S, heads, head_dim] -> [B, heads, S, head_dim] in this order."""
        return x.transpose(1, 2).index_select(2, self.tokens)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return x.index_select(2, self.places).transpose(1, 2)


@lru_cache(maxsize=8)
def bricks(grid: TokenGrid, device: torch.device = CPU, behind: int = 0) -> Order:
    """RainFusion v2's order: a mask block is a brick of 2 x 8 x 8 tokens (frames, rows, columns) after the first frame.

    After the full bricks come an odd last frame in tiles of 8 x 8, the remaining rows, the remaining columns, and the
    first frame.
    """
    frames, height, width = grid
    numbers = torch.arange(frames * height * width).view(grid)
    first, rest = numbers[0], numbers[1:]
    whole, rows, columns = _cut(rest)
    pairs = whole.shape[0] // DEPTH * DEPTH
    parts = [_bricked(whole[:pairs], DEPTH), _bricked(whole[pairs:], 1), rows, columns, first]
    return _order(parts, grid, device, behind)


@lru_cache(maxsize=8)
def tiles(grid: TokenGrid, device: torch.device = CPU, behind: int = 0) -> Order:
    """RainFusion v3's order: a mask block is two neighbouring tiles of 8 x 8 tokens of one frame.

    As in MindIE SD's rf_v2 and rf_v3, each frame has its full tiles first, then the remaining rows, then the remaining
    columns. If there are any, the first frame is not reordered.
    """
    frames, height, width = grid
    numbers = torch.arange(frames * height * width).view(grid)
    remains = height % SIDE or width % SIDE
    parts = [numbers[0]] if remains else []
    for frame in numbers[1:] if remains else numbers:
        whole, rows, columns = _cut(frame[None])
        parts += [_bricked(whole, 1), rows, columns]
    return _order(parts, grid, device, behind)


@lru_cache(maxsize=8)
def by_frames(grid: TokenGrid, device: torch.device = CPU, behind: int = 0) -> Order:
    """RainFusion v1's order (t h w): neighbours belong to the same frame."""
    return _order([torch.arange(grid[0] * grid[1] * grid[2])], grid, device, behind)


@lru_cache(maxsize=8)
def by_places(grid: TokenGrid, device: torch.device = CPU, behind: int = 0) -> Order:
    """RainFusion v1's order (h w t) after the first frame: neighbours are at the same position in successive frames."""
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    return _order([numbers[0], numbers[1:].permute(1, 2, 0)], grid, device, behind)


def _cut(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, W] -> the part that fills tiles, the remaining rows below it, the remaining columns to its right."""
    _, height, width = frames.shape
    whole_rows, whole_columns = height - height % SIDE, width - width % SIDE
    upper = frames[:, :whole_rows]
    return upper[..., :whole_columns], frames[:, whole_rows:], upper[..., whole_columns:]


def _bricked(whole: Tensor, depth: int) -> Tensor:
    """Reorders tokens [T, H, W], which fill bricks of `depth` frames, brick by brick."""
    cut = whole.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE)).unflatten(0, (-1, depth)) if whole.numel() else whole
    return cut.permute(0, 2, 4, 1, 3, 5) if whole.numel() else whole


def _order(parts: list[Tensor], grid: TokenGrid, device: torch.device, behind: int) -> Order:
    """behind: the number of text tokens after the video's; they stay last."""
    video = math.prod(grid)
    tokens = torch.cat([*(part.flatten() for part in parts), torch.arange(video, video + behind)])
    places = torch.empty_like(tokens)
    places[tokens] = torch.arange(len(tokens))
    protected = torch.zeros(blocks_of(len(tokens)), dtype=torch.bool)
    protected[places[: grid[1] * grid[2]] // BLOCK] = True
    protected[places[video:] // BLOCK] = True
    return Order(*(devices.sent(part, device) for part in (tokens, places, protected)))
