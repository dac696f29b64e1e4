"""How the latents of a model are normalised, and how a picture is made of one without its VAE."""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[float, float, float]


@dataclass(frozen=True)
class LatentFormat:
    """mean, std: of each channel; a network sees (latent - mean) / std.

    rgb: weights in -1..1 of each normalised channel for red, green and blue; None: no table is known, and there are no
    previews. rgb_bias: what is added to them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: tuple[Row, ...] | None = None
    rgb_bias: Row = (0.0, 0.0, 0.0)

    @property
    def channels(self) -> int:
        return len(self.mean)
