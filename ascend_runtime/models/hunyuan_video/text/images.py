"""Prepares an image for the vision tower, as the original does with transformers' CLIPImageProcessor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of CLIP's training images (openai/CLIP, clip.py), for channels in 0..1.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LONGEST_RATIO = 100  # of an image's sides: the longer one is resized with the shorter one, and then cropped


def pixels_of(image: Tensor, side: int) -> Tensor:
    """image [H, W, 3] in 0..1 -> [1, 3, side, side], normalised.

    The shorter side becomes `side` (bicubic, antialiased, in 8 bits), the longer one is scaled likewise and rounded
    down, and its middle is kept. Core ComfyUI's clip_preprocess rounds the longer side to the nearest number of pixels,
    which may shift the picture by half a pixel, and resizes in floats before it rounds to 8 bits.
    """
    if max(image.shape[:2]) > LONGEST_RATIO * min(image.shape[:2]):
        height, width = image.shape[:2]
        raise ValueError(f"The image has {width} x {height} pixels; the vision tower needs one that is less narrow.")
    levels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(2, 0, 1)[None]
    height, width = levels.shape[2:]
    size = (side, side * width // height) if height <= width else (side * height // width, side)
    if size != (height, width):
        levels = F.interpolate(levels, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cropped = levels[:, :, top : top + side, left : left + side].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (cropped - mean) / std
