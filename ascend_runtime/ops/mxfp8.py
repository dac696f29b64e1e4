"""MXFP8: fp8 values (e4m3) with one power of two for each group of 32 along the last dim.

    x = value 2^(exponent - 127),  exponent = floor(log2(the largest magnitude of the group)) - 8 + 127 in uint8

(OCP Microscaling Formats 1.0; as npu_dynamic_mx_quant computes it: hicann/ops-nn, aclnnDynamicMxQuant.md, scaleAlg 0.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MX_GROUP = 32
E4M3 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
FP8_EXPONENT = 8  # of its largest power of two
BIAS, LOWEST = 127, -126  # of the exponents; lower ones would make fp32 subnormal
MAX_WEIGHTS = 2**26  # fp32 elements of a weight that are held at once: 256 MiB


def groups_of(width: int) -> int:
    """The number of groups in a row of this width; the last one may be incomplete."""
    return -(-width // MX_GROUP)


def mx_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 with x's shape, exponents [..., groups] in uint8) of x [..., K]."""
    width = x.shape[-1]
    grouped = F.pad(x.float(), (0, -width % MX_GROUP)).unflatten(-1, (-1, MX_GROUP))
    _, above = torch.frexp(grouped.abs().amax(-1))  # floor(log2) + 1, exactly
    exponents = (above - 1 - FP8_EXPONENT).clamp_(LOWEST)
    scaled = torch.ldexp(grouped, -exponents.unsqueeze(-1)).clamp_(-FP8_LARGEST, FP8_LARGEST)
    return scaled.flatten(-2)[..., :width].to(E4M3), (exponents + BIAS).to(torch.uint8)


def mx_dequantized(values: Tensor, exponents: Tensor) -> Tensor:
    """fp32 [..., K] of fp8 values [..., K] and exponents [..., groups]."""
    scales = torch.exp2(exponents.float() - BIAS).repeat_interleave(MX_GROUP, -1)
    return values.float() * scales[..., : values.shape[-1]]


def mx_products(x: Tensor, weight: Tensor, exponents: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, computed in fp32: [M, N] in x's dtype. x [M, K] is quantized first; weight fp8 [N, K],
    exponents [N, groups], bias [N] in fp32."""
    rows = mx_dequantized(*mx_quantized(x))
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    count = max(1, MAX_WEIGHTS // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        part = slice(start, start + count)
        own = mx_dequantized(weight[part], exponents[part])
        out[:, part] = F.linear(rows, own, None if bias is None else bias[part])
    return out
