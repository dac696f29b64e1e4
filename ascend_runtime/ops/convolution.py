"""Convolutions of frames, by the kernel and in the memory format that suit a device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_format(kind: str) -> torch.memory_format:
    """How [B, C, T, H, W] lies in memory: CPUs and CUDA cards convolve, and norm, a pixel's channels in a row; an NPU
    has formats of its own."""
    return torch.contiguous_format if kind == "npu" else torch.channels_last_3d


def convolve_3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    """x [B, C, T, H, W], without padding.

    On a CPU torch leaves out oneDNN where B x C x T x H is small, by a rule that is meant for images: small tiles took
    5 times as long (64 channels, 3 x 62 x 106, one thread of an x86).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride)
