"""Encodes frames to a latent and decodes a latent to frames, with a VAE on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import Tensor

from ..errors import coded_error
from ..hardware import devices
from ..models.registry import vae_for
from ..models.shared.tiling import Piece, tiling_for
from ..models.shared.vae import VideoVae
from ..ops.precision import WIDER, Finite, check_finite, not_finite
from ..parallel.mesh import all_reduce_max

StepReport = Callable[[int, int], None]  # (step counted from 1, total); called on all ranks, may raise on all
Facts = dict[str, str]  # descriptions of the tiling, for `Done.info`


def encode_video(vae: VideoVae, frames: Tensor, latent: Tensor, on_step: StepReport, tiles: str = "auto") -> Facts:
    """Encodes frames [T,H,W,3] in 0..1 into `latent` [1,C,T',H',W'], fp32, on the CPU, not normalised. Each rank writes
    its own tiles.

    The latent is the mean of the VAE's distribution, as in the original and in ComfyUI. on_step: called before each
    step, such as a chunk of frames. tiles: see `tiling_for`. Raises ValueError, on all ranks alike, if the free memory
    is not sufficient.
    """
    tiling, given, finite = tiling_for(vae, "encode", *latent.shape[2:], tiles), Finite(), Finite()
    if (own := tiling.own(frames)) is not None and own.numel():
        given.see(own)
    _check_agreed(given, "The video to encode", "Check the node that made its frames.")
    out = latent[0].movedim(0, -1)
    tiling.begin(out)
    for piece in tiling.encoded(frames, _counted(on_step, tiling.steps("encode", latent.shape[2]))):
        _write(out, piece, finite)
    _check_agreed(finite, "The encoded video")
    return tiling.facts


def decode_video(vae: VideoVae, latent: Tensor, frames: Tensor, on_step: StepReport, tiles: str = "auto") -> Facts:
    """Decodes latent [B,C,T,H,W], not normalised, into `frames` [B*T',H',W',3] in 0..1. Each rank writes its own tiles.

    on_step: called before each step, such as a chunk of frames. tiles: see `tiling_for`. Raises ValueError, on all
    ranks alike, if the free memory is not sufficient, or the latent is not valid for this VAE.
    """
    _check_latent(latent, vae.form.channels)
    _check_host_holds(frames)
    batch, _, length, *size = latent.shape
    tiling, finite = tiling_for(vae, "decode", length, *size, tiles), Finite()
    count_step = _counted(on_step, batch * tiling.steps("decode", length))
    for video, out in zip(latent, frames.unflatten(0, (batch, -1))):
        tiling.begin(out)
        for piece in tiling.decoded(video, count_step):
            written = _write(out, piece, finite)
            if not piece.added:
                written.mul_(0.5).add_(0.5)
        tiling.sums(out).mul_(0.5).add_(0.5).clamp_(0, 1)
    _check_agreed(finite, "The decoded video")
    return tiling.facts


def _write(out: Tensor, piece: Piece, finite: Finite) -> Tensor:
    """Writes a piece to out [T,H,W,C], or adds it. Returns where."""
    place = out[piece.where]
    if piece.content is None:
        return place[:0]
    finite.see(piece.content)
    content = piece.content.movedim(0, -1)
    return place.add_(content) if piece.added else place.copy_(content)


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
        raise coded_error(
            "AV-1207",
            f"The decoded video, {number} frames of {width} x {height} pixels, needs {frames.nbytes / 1e9:.1f} GB of "
            f"the host's memory, but {free / 1e9:.1f} GB are free. Make at most {free * number // frames.nbytes} "
            "frames of this size.",
        )


def _counted(on_step: StepReport, total: int) -> Callable[[], None]:
    numbers = count(1)
    return lambda: on_step(next(numbers), total)


def _check_agreed(finite: Finite, what: str, cure: str = WIDER) -> None:
    """Raises ValueError on all ranks if one has seen values that are not finite, so that none waits in a collective."""
    if all_reduce_max(not finite):
        raise not_finite(what, cure)
