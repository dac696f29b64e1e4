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


def group_moments(x: Tensor, groups: int) -> Tensor:
    """The mean and variance of x [B, C, ...] in each group of channels, in fp32: [2, B, groups].

    On a CPU in two passes, by means: var_mean takes 17 times as long with channels last, and the statistics of torch's
    batch norm lose 4 digits, as it sums a million pixels one by one.
    """
    given, x = x, x.to(NORMS.dtype)
    if x.device.type != "cpu" or way_of(x.device) == "npu":
        parts = x.unflatten(1, (groups, -1))
        variance, mean = torch.var_mean(parts, dim=tuple(range(2, parts.ndim)), correction=0)
        return torch.stack((mean, variance))
    pixels = tuple(range(2, x.ndim))
    mean = x.mean(pixels, keepdim=True)
    deviation = x - mean if x is given else x.sub_(mean)
    variance = deviation.square_().mean(pixels).unflatten(1, (groups, -1))
    mean = mean.view_as(variance)
    whole = mean.mean(2, keepdim=True)
    return torch.stack((whole.squeeze(2), (variance + (mean - whole).square()).mean(2)))


def channel_parameters(moments: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """What `normed_by` reads, [C] each, in fp32: gain, bias, and the mean and variance of each channel's group.
    moments: [2, 1, groups]."""
    mean, variance = moments.transpose(1, 2).expand(-1, -1, len(gain) // moments.shape[2]).flatten(1)
    return gain.to(NORMS.dtype), bias.to(NORMS.dtype), mean, variance


def normed_by(x: Tensor, parameters: tuple[Tensor, ...], eps: float) -> Tensor:
    """GroupNorm of x [1, C, ...] by given statistics.

    Reads x once, in its own dtype: it is a batch norm of an inference, whose mean and variance are each channel's
    group's. Its operators take a 16-bit x and parameters in fp32 (hicann/ops-nn, norm/batch_norm_v3/README.md).
    """
    return torch.native_batch_norm(x, *parameters, False, 0.0, eps)[0]


def attend_pixels(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the pixels of a tile, query [frames, h*w, C], to those of the plane, key and value [frames, H*W, C].

    On an NPU by basic operators, in blocks of rows: torch's own function would call npu_fusion_attention, which is for
    training and not for all cards (Ascend/op-plugin, op_plugin/ops/opapi/ScaledDotProductAttentionKernelNpuOpApi.cpp).
    The operator for inference takes at most 512 channels, and these are up to 1024. One layer attends, at the latent's
    resolution: 0.3 TFLOP for a latent frame of 1280 x 720 pixels.

    On the meta device, memory is taken as on an NPU, which takes the most.
    """
    if not query.is_meta and way_of(query.device) != "npu":
        return F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1)
    rows = max(1, PIXEL_SCORES // (key.shape[0] * key.shape[1]))
    key, value = key.float().transpose(1, 2) * query.shape[-1] ** -0.5, value.float()
    parts = query.split(rows, dim=1)
    if query.is_meta:
        return ((parts[0].float() @ key).softmax(-1) @ value).new_empty(query.shape, dtype=query.dtype)
    attended = [(part.float() @ key).softmax(-1) @ value for part in parts]
    return torch.cat(attended, dim=1).type_as(query)
