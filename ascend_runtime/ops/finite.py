"""Values that are not finite: NaN and infinities, which the extremes of a tensor show.

Extremes, and no sums: a sum of large values is infinite though all of them are finite.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import coded_error

MADE_BY = (
    "Check what made it: a text encoder or VAE in float16 can overflow (set its dtype to bfloat16), and a damaged file "
    "or a custom node can give NaN."
)


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values are finite, also in `dtype` if given. Reads only the minimum and the maximum, which are NaN
    if any value is; waits for the device once."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    return bool(torch.stack(torch.aminmax(tensor)).to(dtype or tensor.dtype).isfinite().all())


def are_finite(parts: Tensor) -> bool:
    """As `is_finite`, part by part of dim 0, of a tensor that torch would copy as it is not contiguous."""
    return not parts.numel() or is_finite(torch.stack([extreme for part in parts for extreme in torch.aminmax(part)]))


def check_finite(tensor: Tensor, what: str, cure: str = MADE_BY) -> None:
    """Raises ValueError for an input with NaN or infinite values, with advice."""
    if not is_finite(tensor):
        raise coded_error("AV-1603", f"{what} has NaN or infinite values. {cure}")


Where = tuple[slice, slice, slice]  # the frames, rows and columns of a piece of a video


class Spread(NamedTuple):
    """The smallest and the largest value of each channel of each frame, [C,T] each, in fp32 on the CPU: NaN if a value
    is; inf and -inf if none was seen. bad: the pieces with values that are not finite."""

    low: Tensor
    high: Tensor
    bad: list[Where]


class Extremes:
    """The extremes of a video's channels and frames, seen piece by piece. They stay on their device until they are
    read, so that looking does not wait for the device."""

    def __init__(self, channels: int, frames: int):
        self._shape = channels, frames
        self._seen: list[tuple[Where, Tensor]] = []  # (where a piece is, its extremes [C,t,2])

    def see(self, piece: Tensor, where: Where) -> None:
        """piece [C,t,h,w]. Looked at frame by frame, as torch would copy a tensor that is not contiguous."""
        extremes = [extreme for channel in piece for frame in channel for extreme in torch.aminmax(frame)]
        self._seen.append((where, torch.stack(extremes).unflatten(0, (*piece.shape[:2], 2))))

    def read(self) -> Spread:
        """Of all pieces; waits for the device once."""
        spread = Spread(torch.full(self._shape, torch.inf), torch.full(self._shape, -torch.inf), [])
        if not self._seen:
            return spread
        values = torch.cat([piece.flatten() for _, piece in self._seen]).float().cpu()
        for (where, piece), own in zip(self._seen, values.split([piece.numel() for _, piece in self._seen])):
            low, high = own.view(piece.shape).unbind(-1)
            spread.low[:, where[0]] = torch.minimum(spread.low[:, where[0]], low)
            spread.high[:, where[0]] = torch.maximum(spread.high[:, where[0]], high)
            if not all(map(math.isfinite, own.tolist())):
                spread.bad.append(where)
        return spread
