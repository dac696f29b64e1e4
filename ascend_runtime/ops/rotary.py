"""Rotary position embedding over interleaved pairs (Su et al., arXiv 2104.09864), as Wan rotates."""

import torch
from torch import Tensor


def rotary_table(cos: Tensor, sin: Tensor) -> Tensor:
    """The complex fp32 table [1, S, 1, head_dim/2] from cos and sin [1, S, 1, head_dim], each value given twice."""
    return torch.complex(cos[..., 0::2].float().contiguous(), sin[..., 1::2].float().contiguous())


def rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) of x [B, S, heads, head_dim] by the angles of `table`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)
