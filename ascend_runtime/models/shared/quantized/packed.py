"""Linear layers whose weights stay in the blocks of their file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....checkpoints.msmodelslim import Layer
from ....ops.blocks.ggml import BLOCK_TYPES, BlockType, dequantized
from ....parallel.tensor import TensorParallel
from .base import QuantizedLinear, new_parameter


class PackedLinear(QuantizedLinear):
    """A linear layer that dequantizes its weight for each product, in the input's dtype.

    Parameters: weight uint8 [out, bytes], rows of blocks (see ops.blocks.ggml); bias [out].
    """

    by_layout = False
    free = ("bias",)
    kind: BlockType

    @property
    def multiple(self) -> int:
        return self.kind.values

    def _add_weight(self, like: nn.Linear) -> None:
        """Its bytes depend on the layer's format: see `_add_scales`."""

    def _add_scales(self, like: nn.Linear, layer: Layer) -> None:
        self.kind = BLOCK_TYPES[layer.algorithm]
        shape = self.kind.shape((like.out_features, like.in_features))
        self.weight = new_parameter(*shape, dtype=torch.uint8)
        self.bias = None if like.bias is None else new_parameter(like.out_features, dtype=like.bias.dtype)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._numbers(x.dtype), self.bias)

    def _all_reduced(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return self.ops.linear_all_reduce(x, self._numbers(x.dtype), self.bias, tp.group)

    def _part(self, x: Tensor, tp: TensorParallel) -> Tensor:
        return F.linear(x, self._numbers(x.dtype))

    def dequantized(self) -> Tensor:
        return self._numbers(torch.float32)

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        return dequantized(self.weight, self.kind, dtype)
