"""Encodes frames to a latent and decodes a latent to frames, with a VAE on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import Tensor

from ..hardware import devices
from ..models.registry import vae_for
from ..models.shared.tiling import tiling_for
from ..models.shared.vae import VideoVae
from ..ops.precision import WIDER, check_finite, is_finite, not_finite
from ..parallel.mesh import all_reduce_max

OnFrame = Callable[[int, int], None]  # (latent frame counted from 1, total); called on all ranks, may raise on all
Facts = dict[str, str]  # descriptions of the tiling, for `Done.info`


def encode_video(vae: VideoVae, frames: Tensor, latent: Tensor, on_frame: OnFrame) -> Facts:
    """Encodes frames [T,H,W,3] in 0..1 into `latent` [1,C,T',H',W'], fp32, on the CPU, not normalised. Each rank writes
    its own tile.

    The latent is the mean of the VAE's distribution, as in the original and in ComfyUI. on_frame: called before each
    chunk of frames. Raises ValueError, on all ranks alike, if the free memory is not sufficient.
    """
    tiling = tiling_for(vae, "encode", *latent.shape[2:])
    _agreed(tiling.own(frames), "The video to encode", "Check the node that made its frames.")
    on_chunk = _counted(on_frame, len(vae.chunks(latent.shape[2])) * tiling.in_turn)
    for where, made in tiling.encoded(frames, on_chunk):
        if _agreed(made, "The encoded video") is not None:
            latent[0][(slice(None), *where)] = made
    return tiling.facts


def decode_video(vae: VideoVae, latent: Tensor, frames: Tensor, on_frame: OnFrame) -> Facts:
    """Decodes latent [B,C,T,H,W], not normalised, into `frames` [B*T',H',W',3] in 0..1. Each rank writes its own tile.

    on_frame: called before each chunk of frames. Raises ValueError, on all ranks alike, if the free memory is not
    sufficient, or the latent is not valid for this VAE.
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
        suitable = vae_for(latent.shape[1]) if latent.ndim == 5 else ""
        cure = f" Load {suitable} for it." if suitable else ""
        raise ValueError(
            f"The latent to decode has the shape {list(latent.shape)}; this VAE decodes [B,{channels},T,H,W].{cure}"
        )
    check_finite(latent, "The latent to decode")


def _check_host_holds(frames: Tensor) -> None:
    """Raises ValueError, on all ranks alike, if frames [T,H,W,3] that are not written yet would not fit into the host's
    memory: the kernel would kill a process."""
    free = -all_reduce_max(-devices.host_memory())
    if frames.nbytes > free:
        number, height, width, _ = frames.shape
        raise ValueError(
            f"The decoded video, {number} frames of {width} x {height} pixels, needs {frames.nbytes / 1e9:.1f} GB of "
            f"the host's memory, but {free / 1e9:.1f} GB are free. Make at most {free * number // frames.nbytes} "
            "frames of this size."
        )


def _counted(on_frame: OnFrame, total: int) -> Callable[[], None]:
    numbers = count(1)
    return lambda: on_frame(next(numbers), total)


def _agreed(made: Tensor | None, what: str, cure: str = WIDER) -> Tensor | None:
    """Returns `made` if it is finite on all ranks; else all ranks raise ValueError, so that none waits in a collective.

    It is checked slice by slice, as torch would copy a tensor that is not contiguous.
    """
    if all_reduce_max(made is not None and not all(map(is_finite, made))):
        raise not_finite(what, cure)
    return made
