"""Orders of a video's tokens in which 128 consecutive ones, a mask block, lie near one another.

No token is left out, whatever the grid: what does not fill a brick or a tile is appended, and the last mask block may
be short. The first latent frame is protected: every mask block that holds a token of it attends to all, and is attended
to by all. So are the tokens of a text that stand behind the video's in its sequence; where the text has an attention of
its own, that is not sparse, and no text is in these orders.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.sparse import BLOCK, blocks_of

SIDE = 8  # tokens of a brick's or a tile's height and width
DEPTH = BLOCK // SIDE**2  # frames of a brick

Grid = tuple[int, int, int]  # tokens of a video: frames, rows, columns
CPU = torch.device("cpu")


class Order(NamedTuple):
    """tokens [S]: a token's number (in order of frames, rows, columns, then the text's) by its place; places [S]: the
    inverse.

    protected [blocks]: which mask blocks hold tokens of the first frame or of the text.
    """

    tokens: Tensor
    places: Tensor
    protected: Tensor

    def of(self, x: Tensor) -> Tensor:
        """[B, S, heads, head_dim] -> [B, heads, S, head_dim] in this order."""
        return x.transpose(1, 2).index_select(2, self.tokens)

    def undone(self, x: Tensor) -> Tensor:
        """The inverse of `of`."""
        return x.index_select(2, self.places).transpose(1, 2)


@lru_cache(maxsize=8)
def bricks(grid: Grid, device: torch.device = CPU, behind: int = 0) -> Order:
    """Of RainFusion 2: 2 x 8 x 8 tokens (frames, rows, columns) after the first frame are a mask block.

    Appended to the whole bricks: an odd last frame in tiles of 8 x 8, the rows below the bricks, the columns beside
    them, and the first frame.
    """
    frames, height, width = grid
    numbers = torch.arange(frames * height * width).view(grid)
    first, rest = numbers[0], numbers[1:]
    whole, below, beside = _cut(rest)
    pairs = whole.shape[0] // DEPTH * DEPTH
    parts = [_bricked(whole[:pairs], DEPTH), _bricked(whole[pairs:], 1), below, beside, first]
    return _order(parts, grid, device, behind)


@lru_cache(maxsize=8)
def tiles(grid: Grid, device: torch.device = CPU, behind: int = 0) -> Order:
    """Of RainFusion 3: two neighbouring tiles of 8 x 8 tokens of a frame are a mask block.

    Frame by frame, as MindIE SD's rf_v2 and rf_v3 order them: the whole tiles, the rows below, the columns beside. With
    such remainders the first frame keeps its own order.
    """
    frames, height, width = grid
    numbers = torch.arange(frames * height * width).view(grid)
    remains = height % SIDE or width % SIDE
    parts = [numbers[0]] if remains else []
    for frame in numbers[1:] if remains else numbers:
        whole, below, beside = _cut(frame[None])
        parts += [_bricked(whole, 1), below, beside]
    return _order(parts, grid, device, behind)


@lru_cache(maxsize=8)
def by_frames(grid: Grid, device: torch.device = CPU, behind: int = 0) -> Order:
    """Of RainFusion 1: (t h w), in which neighbours are of the same frames."""
    return _order([torch.arange(grid[0] * grid[1] * grid[2])], grid, device, behind)


@lru_cache(maxsize=8)
def by_places(grid: Grid, device: torch.device = CPU, behind: int = 0) -> Order:
    """Of RainFusion 1: (h w t) after the first frame, in which neighbours are at the same place of all frames."""
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    return _order([numbers[0], numbers[1:].permute(1, 2, 0)], grid, device, behind)


def _cut(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, W] -> what fills tiles, the rows below, the columns beside."""
    _, height, width = frames.shape
    whole_rows, whole_columns = height - height % SIDE, width - width % SIDE
    upper = frames[:, :whole_rows]
    return upper[..., :whole_columns], frames[:, whole_rows:], upper[..., whole_columns:]


def _bricked(whole: Tensor, depth: int) -> Tensor:
    """[T, H, W] that fill bricks of `depth` frames -> their tokens, brick by brick."""
    cut = whole.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE)).unflatten(0, (-1, depth)) if whole.numel() else whole
    return cut.permute(0, 2, 4, 1, 3, 5) if whole.numel() else whole


def _order(parts: list[Tensor], grid: Grid, device: torch.device, behind: int) -> Order:
    """behind: tokens of a text after those of the video, which stay last."""
    video = math.prod(grid)
    tokens = torch.cat([*(part.flatten() for part in parts), torch.arange(video, video + behind)])
    places = torch.empty_like(tokens)
    places[tokens] = torch.arange(len(tokens))
    protected = torch.zeros(blocks_of(len(tokens)), dtype=torch.bool)
    protected[places[: grid[1] * grid[2]] // BLOCK] = True
    protected[places[video:] // BLOCK] = True
    return Order(tokens.to(device), places.to(device), protected.to(device))
