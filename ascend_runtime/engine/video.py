"""A VAE's work: frames to a latent and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import Tensor

from ..ops.precision import WIDER, check_finite, is_finite, not_finite
from ..parallel.mesh import highest
from .tiling import check_host_holds, tiling_for

OnFrame = Callable[[int, int], None]  # (latent frame 1, 2 ..., of how many); called by all ranks, and may raise on all
Facts = dict[str, str]  # how it was done, in words
VAES = {16: "the Wan 2.1 VAE, which Wan2.2-A14B has too", 48: "the Wan 2.2 VAE of TI2V-5B"}  # by channels of a latent


def encode_video(vae, frames: Tensor, latent: Tensor, on_frame: OnFrame) -> Facts:
    """Encodes frames [T,H,W,3] in 0..1 into latent [1,C,T',H',W'], fp32, on the CPU and not normalised; this rank
    writes its tile.

    It is the mean of what the VAE finds likely, as the original and ComfyUI take it. on_frame: told before each frame
    of a tile. Raises ValueError, on all ranks alike, for what cannot be encoded in the memory that is free.
    """
    tiling = tiling_for(vae, "encode", *latent.shape[3:])
    _agreed(tiling.own(frames), "The video to encode", "Look for what made its frames so before they came here.")
    tell = _counted(on_frame, latent.shape[2] * tiling.in_turn)
    for where, made in tiling.encoded(frames, tell):
        if _agreed(made, "The encoded video") is not None:
            latent[0][(slice(None), *where)] = made
    return tiling.facts


def decode_video(vae, latent: Tensor, frames: Tensor, on_frame: OnFrame) -> Facts:
    """Decodes latent [B,C,T,H,W], not normalised, into frames [B*T',H',W',3] in 0..1; this rank writes its tile.

    on_frame: told before each frame of a tile. Raises ValueError, on all ranks alike, for what cannot be decoded in the
    memory that is free, or at all.
    """
    _check_latent(latent, vae.config.z_dim)
    check_host_holds(frames)
    batch, _, length, *size = latent.shape
    tiling = tiling_for(vae, "decode", *size)
    tell = _counted(on_frame, batch * length * tiling.in_turn)
    for video, out in zip(latent, frames.unflatten(0, (batch, -1))):
        for where, made in tiling.decoded(video, tell):
            if _agreed(made, "The decoded video") is not None:
                out[where].copy_(made.movedim(0, -1)).mul_(0.5).add_(0.5)
    return tiling.facts


def _check_latent(latent: Tensor, channels: int) -> None:
    if latent.ndim != 5 or latent.shape[1] != channels:
        given = latent.shape[1] if latent.ndim == 5 else None
        fits = f" Load {VAES[given]}, for it." if given in VAES else ""
        raise ValueError(
            f"The latent to decode has the shape {list(latent.shape)}; this VAE decodes [B,{channels},T,H,W].{fits}"
        )
    check_finite(latent, "The latent to decode")


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
