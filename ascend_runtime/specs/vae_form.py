"""The shapes of a VAE's latents and frames. Reads no files and does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from .jobs import VideoSize


@dataclass(frozen=True)
class VaeForm:
    """The latent channels and the compression factors of a VAE: spatial (height and width) and temporal.

    family: the family of models that use such latents; empty if unknown. patch: the rows and columns of a latent that
    make one token of these models.
    """

    channels: int
    spatial: int
    temporal: int
    family: str = ""
    patch: int = 2

    @property
    def multiple(self) -> int:
        """Widths and heights of videos must be multiples of this number of pixels."""
        return self.patch * self.spatial

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """[B=1, C, T, H, W]"""
        return size.latent_shape(self.channels, self.spatial, self.temporal)

    def decoded_shape(self, latent: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The shape [B*T',H',W',3] of the frames that a latent [B,C,T,H,W] decodes to."""
        batch, _, frames, height, width = latent
        return batch * ((frames - 1) * self.temporal + 1), height * self.spatial, width * self.spatial, 3

    def encoded_shape(self, video: tuple[int, ...]) -> tuple[int, ...]:
        """The shape [1,C,T',H',W'] of the latent of frames [T,H,W,3].

        Raises ValueError, with the nearest valid sizes, if the VAE cannot encode the frames completely.
        """
        frames, height, width, _ = video
        if frames % self.temporal != 1:
            down = max(1, (frames - 1) // self.temporal * self.temporal + 1)
            raise ValueError(
                f"There are {frames} frames; the VAE encodes {self.temporal}n+1 frames. The nearest are {down} and "
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
