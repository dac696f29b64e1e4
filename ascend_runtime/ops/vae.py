"""What VAEs compute with on each kind of device: the memory format of frames, convolutions, norm, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import way_of
from .precision import NORMS

SMALLEST_LENGTH = 1e-12  # torch.nn.functional.normalize's
PIXEL_SCORES = 2**25  # attention scores that an NPU computes at once: 128 MiB in fp32


def frames_format(kind: str) -> torch.memory_format:
    """The memory format for [B, C, T, H, W]: on CPUs and CUDA devices, convolutions and norms are faster with
    channels last; an NPU has its own formats."""
    return torch.contiguous_format if kind == "npu" else torch.channels_last_3d


def convolve_3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int], padding: tuple[int, int, int]
) -> Tensor:
    """A convolution of x [B, C, T, H, W], padded with zeros on both sides.

    Calls oneDNN directly on a CPU: torch's own heuristic, meant for images, does not use it if B x C x T x H is small,
    which makes small tiles 5 times slower (64 channels, 3 x 62 x 106, one thread of an x86 CPU).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def channel_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x [B, C, ...] over the Euclidean length of each pixel's channels, times gain [C, 1, ...]; with sqrt(C) in the
    gain, an RMS norm. Equal to torch.nn.functional.normalize and a product.

    Reads x twice and the quotient once. Lengths are summed in fp32. On an NPU they are rounded to x's dtype if that is
    bfloat16, which has fp32's range: of operands of two dtypes, CANN writes the quotient in fp32 and converts it, three
    times the traffic (hicann/ops-math, math/div/op_api/aclnn_div.cpp).
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=NORMS.dtype).clamp_min_(SMALLEST_LENGTH)
    if x.dtype == torch.bfloat16 and way_of(x.device) == "npu":
        length = length.bfloat16()
    return torch.div(x, length, out=torch.empty_like(x)).mul_(gain)


def attend_pixels(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the pixels of a tile, query [frames, h*w, C], to those of the plane, key and value [frames, H*W, C].

    On an NPU by basic operators, in blocks of rows: torch's own function would call npu_fusion_attention, which is for
    training and not for all cards (Ascend/op-plugin, op_plugin/ops/opapi/ScaledDotProductAttentionKernelNpuOpApi.cpp).
    The operator for inference takes at most 512 channels, and these are up to 1024. One layer attends, at the latent's
    resolution: 0.3 TFLOP for a latent frame of 1280 x 720 pixels.
    """
    if way_of(query.device) != "npu":
        return F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1)
    rows = max(1, PIXEL_SCORES // (key.shape[0] * key.shape[1]))
    key, value = key.float().transpose(1, 2) * query.shape[-1] ** -0.5, value.float()
    attended = [(part.float() @ key).softmax(-1) @ value for part in query.split(rows, dim=1)]
    return torch.cat(attended, dim=1).type_as(query)
