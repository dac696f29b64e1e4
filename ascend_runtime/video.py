"""A VAE's work: frames to a latent and back, a latent frame at a time, each rank its tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from .families import wan_vae
from .parallel.mesh import highest
from .parallel.tiles import Tile, tile_of
from .precision import check_finite, is_finite, not_finite

OnFrame = Callable[[int, int], None]  # (latent frame 1, 2 ..., of how many); called by all ranks, and may raise on all


def encode_video(vae, frames: Tensor, latent: Tensor, on_frame: OnFrame) -> None:
    """Encodes frames [T,H,W,3] in 0..1 into latent [1,C,T',H',W'], fp32, on the CPU and not normalised: this rank its
    tile of it.

    It is the mean of what the VAE finds likely, as the original and ComfyUI take it. on_frame: told before each.
    """
    count, height, width = latent.shape[2:]
    tile = tile_of(height, width)
    own = None if tile is None else frames[:, *tile.place(vae.config.scale_factor_spatial), :3]
    _agreed(own, "The video to encode")
    tiles = iter(()) if tile is None else wan_vae.encoded(vae, _groups(vae, own), tile)
    for index in range(count):
        on_frame(index + 1, count)
        encoded = _agreed(next(tiles, None), "The encoded video")
        if encoded is not None:
            latent[0, :, index][:, *tile.place()] = encoded


def decode_video(vae, latent: Tensor, frames: Tensor, on_frame: OnFrame) -> None:
    """Decodes latent [B,C,T,H,W], not normalised, into frames [B*T',H',W',3] in 0..1: this rank its tile of them.

    on_frame: told before each.
    """
    _check_latent(latent, vae.config.z_dim)
    batch, _, count, height, width = latent.shape
    tile = tile_of(height, width)
    for number, (video, out) in enumerate(zip(latent, frames.unflatten(0, (batch, -1)))):
        tiles = iter(()) if tile is None else wan_vae.decoded(vae, _latent_frames(vae, video, tile), tile)
        for index in range(count):
            on_frame(number * count + index + 1, batch * count)
            decoded = _agreed(next(tiles, None), "The decoded video")
            if decoded is not None:
                place = out[_frames_of(index)][:, *tile.place(vae.config.scale_factor_spatial)]
                place.copy_(decoded.permute(1, 2, 3, 0)).mul_(0.5).add_(0.5)


def _groups(vae, frames: Tensor) -> Iterator[Tensor]:
    """Of frames [T,h,w,3] in 0..1, those [3,t,h,w] in -1..1 of each frame of a latent, on the VAE's device."""
    for index in range((len(frames) - 1) // wan_vae.FRAMES + 1):
        yield frames[_frames_of(index)].to(vae.device, vae.dtype).movedim(-1, 0) * 2 - 1


def _latent_frames(vae, latent: Tensor, tile: Tile) -> Iterator[Tensor]:
    """This tile's frames [C,h,w] of a latent [C,T,H,W], on the VAE's device."""
    rows, columns = tile.place()
    return (frame[:, rows, columns].to(vae.device, vae.dtype) for frame in latent.unbind(1))


def _frames_of(index: int) -> slice:
    """The frames that a frame of a latent stands for."""
    return slice(0, 1) if index == 0 else slice(wan_vae.FRAMES * (index - 1) + 1, wan_vae.FRAMES * index + 1)


def _agreed(tile: Tensor | None, what: str) -> Tensor | None:
    """`tile`, if all ranks' are numbers; else all raise ValueError, and none is left in an exchange."""
    if highest(tile is not None and not is_finite(tile)):
        raise not_finite(what)
    return tile


def _check_latent(latent: Tensor, channels: int) -> None:
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise ValueError(
            f"The latent has the shape {list(latent.shape)}; this VAE decodes [B,{channels},T,H,W]. "
            "Wan 2.1 and Wan2.2-A14B latents have 16 channels (the Wan 2.1 VAE), Wan2.2-TI2V-5B's 48 (the Wan 2.2 VAE)."
        )
    check_finite(latent, "The latent")
