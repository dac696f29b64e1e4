"""What LoRAs add to the output of a quantized layer, whose weight they leave as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class LoraTerm:
    """x A^T (B * scales)^T + bias, next to a product with a weight [out, in]. The ranks of several LoRAs are in one
    pair of matrices, so that they cost two small products.

    down: A [rank, in], up: B [out, rank], in the dtype of the blocks; None: only the bias changes. scales [rank]: the
    factors of each LoRA's columns of B, among them its strength, in fp32. bias [out] in fp32; None: it does not change.

    Tensor parallelism cuts B and the bias along the outputs of a column-parallel layer, and A along the inputs of a
    row-parallel one.
    """

    down: Tensor | None
    up: Tensor | None
    scales: Tensor | None
    bias: Tensor | None = None

    def added_to(self, out: Tensor, x: Tensor, with_bias: bool = True) -> Tensor:
        """`out` [..., out], to which the term of x [..., in] was added in place."""
        bias = self.bias if with_bias else None
        if self.down is None:
            return out if bias is None else out.add_(bias)
        hidden, up = x.flatten(0, -2) @ self.down.t(), self.up * self.scales
        if bias is not None:  # as one more column, which costs no pass over the output
            hidden, up = F.pad(hidden, (0, 1), value=1.0), torch.cat([up, bias[:, None]], 1)
        out.view(-1, out.shape[-1]).addmm_(hidden, up.to(out.dtype).t())
        return out

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.down, self.up, self.scales, self.bias) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)
