"""A VAE's work: frames to a latent and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import Tensor

from ..hardware import devices
from ..models.registry import vae_for
from ..models.shared.tiling import tiling_for
from ..models.shared.vae import VideoVae
from ..ops.precision import WIDER, check_finite, is_finite, not_finite
from ..parallel.mesh import highest

OnFrame = Callable[[int, int], None]  # (latent frame 1, 2 ..., of how many); called by all ranks, and may raise on all
Facts = dict[str, str]  # how it was done, in words


def encode_video(vae: VideoVae, frames: Tensor, latent: Tensor, on_frame: OnFrame) -> Facts:
    """Encodes frames [T,H,W,3] in 0..1 into latent [1,C,T',H',W'], fp32, on the CPU and not normalised; this rank
    writes its tile.

    It is the mean of the VAE's distribution, as the original and ComfyUI take it. on_frame: called before each chunk of
    a tile. Raises ValueError, on all ranks alike, for what cannot be encoded in the memory that is free.
    """
    tiling = tiling_for(vae, "encode", *latent.shape[2:])
    _agreed(tiling.own(frames), "The video to encode", "Look for what made its frames so before they came here.")
    on_chunk = _counted(on_frame, len(vae.chunks(latent.shape[2])) * tiling.in_turn)
    for where, made in tiling.encoded(frames, on_chunk):
        if _agreed(made, "The encoded video") is not None:
            latent[0][(slice(None), *where)] = made
    return tiling.facts


def decode_video(vae: VideoVae, latent: Tensor, frames: Tensor, on_frame: OnFrame) -> Facts:
    """Decodes latent [B,C,T,H,W], not normalised, into frames [B*T',H',W',3] in 0..1; this rank writes its tile.

    on_frame: called before each chunk of a tile. Raises ValueError, on all ranks alike, for what cannot be decoded in
    the memory that is free, or at all.
    """
    _check_latent(latent, vae.form.channels)
    _check_host_holds(frames)
    batch, _, length, *size = latent.shape
    tiling = tiling_for(vae, "decode", length, *size)
    on_chunk = _counted(on_frame, batch * len(vae.chunks(length)) * tiling.in_turn)
    for video, out in zip(latent, frames.unflatten(0, (batch, -1))):
        for where, made in tiling.decoded(video, on_chunk):
            if _agreed(made, "The decoded video") is not None:
                out[where].copy_(made.movedim(0, -1)).mul_(0.5).add_(0.5)
    return tiling.facts


def _check_latent(latent: Tensor, channels: int) -> None:
    if latent.ndim != 5 or latent.shape[1] != channels:
        fitting = vae_for(latent.shape[1]) if latent.ndim == 5 else ""
        fits = f" Load {fitting}, for it." if fitting else ""
        raise ValueError(
            f"The latent to decode has the shape {list(latent.shape)}; this VAE decodes [B,{channels},T,H,W].{fits}"
        )
    check_finite(latent, "The latent to decode")


def _check_host_holds(frames: Tensor) -> None:
    """Raises ValueError, on all ranks alike, where frames [T,H,W,3] that nobody has written to yet would not fit into
    the host's memory: the kernel would end some process for it."""
    free = -highest(-devices.host_memory())
    if frames.nbytes > free:
        number, height, width, _ = frames.shape
        raise ValueError(
            f"The decoded video, {number} frames of {width} x {height} pixels, takes {frames.nbytes / 1e9:.1f} GB of "
            f"the host's memory, and {free / 1e9:.1f} GB are free. What would fit: {free * number // frames.nbytes} "
            "frames of this size."
        )


def _counted(on_frame: OnFrame, total: int) -> Callable[[], None]:
    numbers = count(1)
    return lambda: on_frame(next(numbers), total)


def _agreed(made: Tensor | None, what: str, cure: str = WIDER) -> Tensor | None:
    """`made`, if all ranks' are numbers; else all raise ValueError, and none is left in an exchange.

    Looked at by its first axis: of what lies apart, as a tile of frames does, torch makes a copy to look at it.
    """
    if highest(made is not None and not all(map(is_finite, made))):
        raise not_finite(what, cure)
    return made
