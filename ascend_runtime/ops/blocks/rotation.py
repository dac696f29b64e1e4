"""Regular Hadamard rotations of groups of neighbours, which spread outliers over their group (ConvRot).

The matrix of size 4 is symmetric and has the rows (1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1) / 2; that
of size 4^n is the Kronecker product of n of them. So each is symmetric and its own inverse: (x H) (w H)^T = x w^T.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SMALLEST, LARGEST = 4, 4096  # of the groups that are supported; published models have 256


def is_rotation(size: int) -> bool:
    """Whether there is a rotation of groups of this size: a power of 4, within bounds."""
    return SMALLEST <= size <= LARGEST and size & (size - 1) == 0 and size.bit_length() % 2 == 1


def rotated(x: Tensor, size: int) -> Tensor:
    """x [..., K] with each group of `size` neighbours of the last dim multiplied by the rotation; 0: x itself."""
    if not size:
        return x
    return (x.unflatten(-1, (-1, size)) @ _matrix(size, x.dtype, x.device)).flatten(-2)


@lru_cache(maxsize=16)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rotation [size, size]; its values are powers of two, which all dtypes hold exactly."""
    first = (torch.ones(4, 4) - 2 * torch.eye(4).flip(0)) / 2
    made = first
    while len(made) < size:
        made = torch.kron(made, first)
    return made.to(device, dtype)
