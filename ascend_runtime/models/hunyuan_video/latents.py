"""The latents of the HunyuanVideo VAE: normalisation and preview colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..latent_format import LatentFormat

CHANNELS, SPATIAL, TEMPORAL = 16, 8, 4
SCALING = 0.476986  # a network reads latents times this (scaling_factor of the published config)

# RGB weights in -1..1 of each normalised channel, and a bias: those of ComfyUI's latent format HunyuanVideo.
RGB = (
    (-0.0395, -0.0331, 0.0445), (0.0696, 0.0795, 0.0518), (0.0135, -0.0945, -0.0282), (0.0108, -0.0250, -0.0765),
    (-0.0209, 0.0032, 0.0224), (-0.0804, -0.0254, -0.0639), (-0.0991, 0.0271, -0.0669), (-0.0646, -0.0422, -0.0400),
    (-0.0696, -0.0595, -0.0894), (-0.0799, -0.0208, -0.0375), (0.1166, 0.1627, 0.0962), (0.1165, 0.0432, 0.0407),
    (-0.2315, -0.1920, -0.1355), (-0.0270, 0.0401, -0.0821), (-0.0616, -0.0997, -0.0727), (0.0249, -0.0469, -0.1703),
)  # fmt: skip
RGB_BIAS = (0.0259, -0.0192, -0.0761)


def latent_format(config: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentFormat:
    """The latent format of a transformer, from the config of the VAE next to it if that has it, else the published
    one."""
    channels, scaling = config.get("out_channels", CHANNELS), vae.get("scaling_factor", SCALING)
    table = RGB if channels == CHANNELS else None
    return LatentFormat((0.0,) * channels, (1 / scaling,) * channels, table, RGB_BIAS)
