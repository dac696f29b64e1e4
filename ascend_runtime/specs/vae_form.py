"""Which latent a VAE makes of a video of some size, and which video of a latent; free of files and of torch."""

from __future__ import annotations

from dataclasses import dataclass

from .jobs import VideoSize


@dataclass(frozen=True)
class VaeForm:
    """A latent's channels, and the pixels (of height and of width) and frames that one of it stands for.

    family: of the models whose latents have this form; empty where that is not known.
    """

    channels: int
    spatial: int
    temporal: int
    family: str = ""

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """[B=1, C, T, H, W]"""
        return size.latent_shape(self.channels, self.spatial, self.temporal)

    def decoded_shape(self, latent: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The frames [B*T',H',W',3] that the VAE makes of a latent [B,C,T,H,W]."""
        batch, _, frames, height, width = latent
        return batch * ((frames - 1) * self.temporal + 1), height * self.spatial, width * self.spatial, 3

    def encoded_shape(self, video: tuple[int, ...]) -> tuple[int, ...]:
        """The latent [1,C,T',H',W'] that the VAE makes of frames [T,H,W,3].

        Raises ValueError where it does not encode such frames whole, with the nearest that it does.
        """
        frames, height, width, _ = video
        if frames % self.temporal != 1:
            down = max(1, (frames - 1) // self.temporal * self.temporal + 1)
            raise ValueError(
                f"There are {frames} frames; the VAE encodes {self.temporal}n+1. The nearest are {down} and "
                f"{down + self.temporal}."
            )
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.spatial:
                down = pixels // self.spatial * self.spatial
                near = f"{down} and {down + self.spatial}" if down else f"{self.spatial}"
                raise ValueError(
                    f"The frames' {name} is {pixels}; it must be a multiple of {self.spatial}, such as {near}."
                )
        latent_frames = (frames - 1) // self.temporal + 1
        return 1, self.channels, latent_frames, height // self.spatial, width // self.spatial
