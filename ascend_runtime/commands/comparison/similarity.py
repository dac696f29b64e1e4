"""Similarity of two videos: PSNR, and SSIM by kornia."""

from __future__ import annotations

import math

from kornia.metrics import ssim
from torch import Tensor

WINDOW = 11  # pixels, with a Gaussian of sigma 1.5, as in Wang et al. 2004


def psnr(frames: Tensor, reference: Tensor) -> float:
    """The peak signal-to-noise ratio in dB of frames [T,H,W,3] in 0..1, over the whole video; infinity if they are
    equal."""
    error = float((frames.double() - reference.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def mean_ssim(frames: Tensor, reference: Tensor) -> float:
    """The structural similarity index of frames [T,H,W,3] in 0..1, averaged over pixels, channels and frames; 1 if they
    are equal. Computed frame by frame to limit memory."""
    pairs = zip(frames.movedim(-1, 1).split(1), reference.movedim(-1, 1).split(1))
    values = [float(ssim(one, other, WINDOW, padding="valid").mean()) for one, other in pairs]
    return sum(values) / len(values)
