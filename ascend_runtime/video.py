"""A VAE's work: frames to a latent and back, a latent frame at a time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable

from torch import Tensor, nn

from .precision import check_finite

OnFrame = Callable[[int, int], None]  # (latent frame 1, 2 ..., of how many)


def encode_video(vae, frames: Tensor, on_frame: OnFrame) -> Tensor:
    """The latent [1,C,T',H',W'], fp32, on the CPU and not normalised, of frames [T,H,W,3] in 0..1.

    It is the mean of what the VAE finds likely, as the original and ComfyUI take it. on_frame: told before each.
    """
    _check_frames(frames, vae.config.scale_factor_spatial)
    video = frames[..., :3].to(vae.device, vae.dtype).movedim(-1, 0).unsqueeze(0)  # [1,3,T,H,W]
    with _told(vae, vae.encoder, (video.shape[2] - 1) // 4 + 1, on_frame):
        latent = vae.encode(video * 2 - 1, return_dict=False)[0].mode()
    check_finite(latent, "The encoded video")
    return latent.float().cpu()


def decode_video(vae, latent: Tensor, frames: Tensor, on_frame: OnFrame) -> None:
    """Decodes latent [B,C,T,H,W], not normalised, into frames [B*T',H',W',3] in 0..1. on_frame: told before each."""
    _check_latent(latent, vae.config.z_dim)
    latent = latent.to(vae.device, vae.dtype)
    with _told(vae, vae.decoder, latent.shape[0] * latent.shape[2], on_frame):
        per_video = frames.unflatten(0, (latent.shape[0], -1))
        for video, out in zip(latent, per_video):
            decoded = vae.decode(video.unsqueeze(0), return_dict=False)[0][0]  # [3,T',H',W'] in -1..1
            check_finite(decoded, "The decoded video")
            out.copy_(decoded.permute(1, 2, 3, 0)).mul_(0.5).add_(0.5)


@contextmanager
def _told(vae, part: nn.Module, total: int, on_frame: OnFrame):
    """Tells of each latent frame, which is one call of the VAE's encoder or decoder. on_frame may raise."""
    calls = iter(range(1, total + 1))
    hook = part.register_forward_pre_hook(lambda *_: on_frame(next(calls), total))
    try:
        yield
    finally:
        hook.remove()
        vae.clear_cache()


def _check_frames(frames: Tensor, spatial: int) -> None:
    """Raises ValueError for frames that a VAE with this factor between pixels and latent does not encode whole."""
    if frames.ndim != 4 or frames.shape[-1] < 3 or not frames.numel():
        raise ValueError(f"The frames have the shape {list(frames.shape)}; a video's is [T,H,W,3], all 1 or more.")
    count, *size, _ = frames.shape
    if count % 4 != 1:
        down = max(1, (count - 1) // 4 * 4 + 1)
        raise ValueError(f"There are {count} frames; the VAE encodes 4n+1. The nearest are {down} and {down + 4}.")
    for name, pixels in zip(("height", "width"), size):
        if pixels % spatial:
            down = pixels // spatial * spatial
            near = f"{down} and {down + spatial}" if down else f"{spatial}"
            raise ValueError(f"The frames' {name} is {pixels}; it must be a multiple of {spatial}, such as {near}.")
    check_finite(frames, "The video to encode")


def _check_latent(latent: Tensor, channels: int) -> None:
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise ValueError(
            f"The latent has the shape {list(latent.shape)}; this VAE decodes [B,{channels},T,H,W]. "
            "Wan 2.1 and Wan2.2-A14B latents have 16 channels (the Wan 2.1 VAE), Wan2.2-TI2V-5B's 48 (the Wan 2.2 VAE)."
        )
    check_finite(latent, "The latent")
