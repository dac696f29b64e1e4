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
from ..ops.finite import Extremes, are_finite, check_finite, is_finite
from ..parallel.mesh import all_reduce_max
from .guard.frames import DoneFacts, agreed, not_decoded, not_encoded, numbered, with_warnings

StepReport = Callable[[int, int], None]  # (step counted from 1, total); called on all ranks, may raise on all
OnWritten = Callable[[Tensor], None]  # (a view of the output, which this rank will not change any more)


def encode_video(
    vae: VideoVae,
    frames: Tensor,
    latent: Tensor,
    on_step: StepReport,
    tiles: str = "auto",
    on_written: OnWritten = lambda written: None,
) -> DoneFacts:
    """Encodes frames [T,H,W,3] in 0..1 into `latent` [1,C,T',H',W'], fp32, on the CPU, not normalised. Each rank writes
    its own tiles.

    The latent is the mean of the VAE's distribution, as in the original and in ComfyUI. on_step: called before each
    step, such as a chunk of frames. tiles: see `tiling_for`. on_written: called with finished parts of `latent`, by
    the rank that wrote them. Raises ValueError, on all ranks alike, if the free memory is not sufficient, or values
    are not finite.
    """
    tiling = tiling_for(vae, "encode", *latent.shape[2:], tiles)
    own = tiling.own(frames)
    if all_reduce_max(own is not None and not are_finite(own)):
        bad = [number for number, frame in enumerate(frames) if not is_finite(frame[..., :3])]
        what = f"The video to encode, in {numbered(bad, len(frames))},"
        check_finite(frames[bad][..., :3], what, "Check the node that made its frames.")
    out, seen = latent[0].movedim(0, -1), Extremes(*latent.shape[1:3])
    tiling.begin(out)
    for piece in tiling.encoded(frames, _counted(on_step, tiling.steps("encode", latent.shape[2]))):
        written = _write(out, piece, seen)
        if piece.weights is None:
            on_written(written.movedim(-1, 0)[None])
    on_written(tiling.sums(out).movedim(-1, 0)[None])
    agreed(seen, out, lambda where: not_encoded(vae, frames, where))
    return tiling.facts


def decode_video(
    vae: VideoVae,
    latent: Tensor,
    frames: Tensor,
    on_step: StepReport,
    tiles: str = "auto",
    on_written: OnWritten = lambda written: None,
) -> DoneFacts:
    """Decodes latent [B,C,T,H,W], not normalised, into `frames` [B*T',H',W',3] in 0..1. Each rank writes its own tiles.

    on_step: called before each step, such as a chunk of frames. tiles: see `tiling_for`. on_written: called with
    finished parts of `frames`, by the rank that wrote them. Raises ValueError, on all ranks alike, if the free memory
    is not sufficient, the latent is not valid for this VAE, or frames are not finite.
    """
    _check_latent(latent, vae.form.channels)
    _check_host_holds(frames)
    batch, _, length, *size = latent.shape
    tiling, seen = tiling_for(vae, "decode", length, *size, tiles), Extremes(3, len(frames))
    count_step = _counted(on_step, batch * tiling.steps("decode", length))
    for number, (video, out) in enumerate(zip(latent, frames.unflatten(0, (batch, -1)))):
        tiling.begin(out)
        for piece in tiling.decoded(video, count_step):
            written = _write(out, piece, seen, number * len(out))
            if piece.weights is None:
                on_written(written.mul_(0.5).add_(0.5))
        on_written(tiling.sums(out).mul_(0.5).add_(0.5).clamp_(0, 1))
    spread = agreed(seen, frames, lambda where: not_decoded(vae, latent, where))
    return with_warnings(tiling.facts, spread, frames.unflatten(0, (batch, -1)), latent)


def _write(out: Tensor, piece: Piece, seen: Extremes, first: int = 0) -> Tensor:
    """Writes a piece to out [T,H,W,C], or adds it. Returns where. first: the number of out's first frame among all."""
    place = out[piece.where]
    if piece.content is None:
        return place[:0]
    start, stop, _ = piece.where[0].indices(len(out))
    seen.see(piece.content, (slice(first + start, first + stop), *piece.where[1:]))
    if piece.weights is None:
        return place.copy_(piece.content.movedim(0, -1))
    return place.add_((piece.content.float() * piece.weights).movedim(0, -1))


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
