"""3D convolutions with the kernel and memory format that suit a device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_format(kind: str) -> torch.memory_format:
    """The memory format for [B, C, T, H, W]: on CPUs and CUDA devices, convolutions and norms are faster with
    channels last; an NPU has its own formats."""
    return torch.contiguous_format if kind == "npu" else torch.channels_last_3d


def convolve_3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    """A convolution of x [B, C, T, H, W] without padding.

    Calls oneDNN directly on a CPU: torch's own heuristic, meant for images, does not use it if B x C x T x H is small,
    which makes small tiles 5 times slower (64 channels, 3 x 62 x 106, one thread of an x86 CPU).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride)
