"""How a model's latents are normalised, and previewed without the VAE."""

from __future__ import annotations

from dataclasses import dataclass

RgbRow = tuple[float, float, float]


@dataclass(frozen=True)
class LatentFormat:
    """mean, std: of each channel; a network reads (latent - mean) / std.

    rgb: weights of each normalised channel for red, green and blue in -1..1; None: there is no table, so no previews.
    rgb_bias: added to the weighted sums.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: tuple[RgbRow, ...] | None = None
    rgb_bias: RgbRow = (0.0, 0.0, 0.0)

    @property
    def channels(self) -> int:
        return len(self.mean)
