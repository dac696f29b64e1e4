"""How like two videos are: PSNR and SSIM, by kornia."""

from __future__ import annotations

import math

from kornia.metrics import ssim
from torch import Tensor

WINDOW = 11  # pixels, with a Gaussian of 1.5, as Wang et al. 2004 have it


def psnr(frames: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames [T,H,W,3] in 0..1, over the whole video; infinite where all is
    equal."""
    error = float((frames.double() - reference.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def mean_ssim(frames: Tensor, reference: Tensor) -> float:
    """The structural similarity index of frames [T,H,W,3] in 0..1, the mean over pixels, channels and frames; 1 where
    all is equal. Frames are taken one by one, as a video's map would take much memory."""
    pairs = zip(frames.movedim(-1, 1).split(1), reference.movedim(-1, 1).split(1))
    values = [float(ssim(one, other, WINDOW, padding="valid").mean()) for one, other in pairs]
    return sum(values) / len(values)
