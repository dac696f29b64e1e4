"""Encodes frames to a latent and decodes a latent to frames, with a VAE on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..errors import coded
from ..hardware import devices
from ..models.registry import vae_for
from ..models.shared.tiling import Piece, tiling_for
from ..models.shared.vae import VideoVae
from ..ops.finite import Extremes, Spread, are_finite, check_finite, is_finite
from ..parallel.mesh import all_reduce_max, all_reduce_max_of, this_rank, world_size
from .guard import BAD, COMPARE, again, bad_weights, listed

StepReport = Callable[[int, int], None]  # (step counted from 1, total); called on all ranks, may raise on all
Facts = dict[str, Any]  # descriptions of the tiling, and warnings, for `Done.info`
ALIKE = 2 / 255  # what frames in -1..1 may differ by and look the same: a step of 8 bits
RUN = 4  # frames of one colour in a row that are reported: those of a latent's frame
LATENTS, FRAMES = 100.0, 10.0  # that no value of a latent, or of an image in 0..1, reaches
CHANGE = 0.05  # of a latent, in its standard deviations, that a moving picture exceeds


def encode_video(vae: VideoVae, frames: Tensor, latent: Tensor, on_step: StepReport, tiles: str = "auto") -> Facts:
    """Encodes frames [T,H,W,3] in 0..1 into `latent` [1,C,T',H',W'], fp32, on the CPU, not normalised. Each rank writes
    its own tiles.

    The latent is the mean of the VAE's distribution, as in the original and in ComfyUI. on_step: called before each
    step, such as a chunk of frames. tiles: see `tiling_for`. Raises ValueError, on all ranks alike, if the free memory
    is not sufficient, or values are not finite.
    """
    tiling = tiling_for(vae, "encode", *latent.shape[2:], tiles)
    own = tiling.own(frames)
    if all_reduce_max(own is not None and not are_finite(own)):
        bad = [number for number, frame in enumerate(frames) if not is_finite(frame[..., :3])]
        what = f"The video to encode, in {_numbers(bad, len(frames))},"
        check_finite(frames[bad][..., :3], what, "Check the node that made its frames.")
    out, seen = latent[0].movedim(0, -1), Extremes(*latent.shape[1:3])
    tiling.begin(out)
    for piece in tiling.encoded(frames, _counted(on_step, tiling.steps("encode", latent.shape[2]))):
        _write(out, piece, seen)
    _agreed(seen, out, lambda where: _not_encoded(vae, frames, where))
    return tiling.facts


def decode_video(vae: VideoVae, latent: Tensor, frames: Tensor, on_step: StepReport, tiles: str = "auto") -> Facts:
    """Decodes latent [B,C,T,H,W], not normalised, into `frames` [B*T',H',W',3] in 0..1. Each rank writes its own tiles.

    on_step: called before each step, such as a chunk of frames. tiles: see `tiling_for`. Raises ValueError, on all
    ranks alike, if the free memory is not sufficient, the latent is not valid for this VAE, or frames are not finite.
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
                written.mul_(0.5).add_(0.5)
        tiling.sums(out).mul_(0.5).add_(0.5).clamp_(0, 1)
    spread = _agreed(seen, frames, lambda where: _not_decoded(vae, latent, where))
    return _with_warnings(tiling.facts, spread, frames.unflatten(0, (batch, -1)), latent)


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


# Whether the values are finite


def _agreed(seen: Extremes, out: Tensor, error: Callable[[str], ValueError]) -> Spread:
    """What all ranks have seen of out [T,H,W,C], by one exchange. Raises `error`, of where they are, on all ranks if
    one has seen values that are not finite, so that none waits in a collective."""
    (low, high, bad), (length, *size, channels) = seen.read(), out.shape
    frames = ~((low > high) | (low.isfinite() & high.isfinite())).all(0)
    ranks, corners = torch.zeros(world_size()), torch.full((4,), -torch.inf)
    if bad:
        ranks[this_rank()] = 1
        sides = [[side.indices(length)[:2] for side, length in zip(where[1:], size)] for where in bad]
        corners = torch.tensor([[-rows[0], -columns[0], rows[1], columns[1]] for rows, columns in sides]).amax(0)
        low, high = low.nan_to_num(), high.nan_to_num()
    parts = [frames.float(), ranks, corners.float(), high.flatten(), -low.flatten()]
    together = all_reduce_max_of(torch.cat(parts)).split([part.numel() for part in parts])
    numbers, who = ([number for number, flag in enumerate(part.tolist()) if flag] for part in together[:2])
    if who:
        top, left, bottom, right = map(int, together[2].abs().tolist())
        raise error(
            f"{_numbers(numbers, length)}, rows {top} to {bottom - 1}, columns {left} to {right - 1} (rank "
            f"{', '.join(map(str, who))})"
        )
    return Spread(-together[4].view(channels, length), together[3].view(channels, length), [])


def _not_decoded(vae: VideoVae, latent: Tensor, where: str) -> ValueError:
    """Why decoded frames are not finite. Collective."""
    if weights := bad_weights(vae.network):
        return _broken_vae("decoded", where, weights)
    cure = _cure(vae, "latent", latent, LATENTS)
    return ValueError(coded("AV-1606", f"The decoded video has {BAD} in {where}. {cure}"))


def _not_encoded(vae: VideoVae, frames: Tensor, where: str) -> ValueError:
    """Why an encoded latent is not finite. Collective."""
    if weights := bad_weights(vae.network):
        return _broken_vae("encoded", where, weights)
    cure = _cure(vae, "video", frames, FRAMES)
    return ValueError(coded("AV-1607", f"The encoded video has {BAD} in the latent's {where}. {cure}"))


def _broken_vae(work: str, where: str, weights: list[str]) -> ValueError:
    text = f"The {work} video has {BAD} in {where}, as the VAE has in {listed(weights)}. {again('the VAE file')}"
    return ValueError(coded("AV-1602", text))


def _cure(vae: VideoVae, name: str, given: Tensor, usual: float) -> str:
    """What to do if no weight is at fault. given: what the VAE read; usual: the largest value of others' that is."""
    largest = max(abs(float(extreme)) for extreme in torch.aminmax(given))
    if largest > usual:
        return f"The {name} that was given reaches {largest:.3g}, and others stay below {usual:g}: check what made it."
    if vae.dtype == torch.float16:
        return "float16, the VAE's dtype, ends at 65504: try dtype bfloat16, or float32."
    compare = f"; {COMPARE}" if vae.device.type == "npu" else ""
    return f"Check the VAE's file, and that it belongs to the model of the latent{compare}."


# What looks wrong


def _with_warnings(facts: Facts, spread: Spread, videos: Tensor, latent: Tensor) -> Facts:
    """facts, with warnings about frames of one colour and about videos that do not move, of videos [B,T,H,W,3] whose
    extremes are known already. On rank 0 only."""
    if this_rank() != 0:
        return facts
    warnings, length = [], videos.shape[1]
    for number, video in enumerate(videos):
        own = slice(number * length, (number + 1) * length)
        low, high = spread.low[:, own].clamp(-1, 1), spread.high[:, own].clamp(-1, 1)
        name = f"Video {number + 1}: " if len(videos) > 1 else ""
        if run := _longest_run(((high - low) <= ALIKE).all(0).tolist(), least=min(RUN, length)):
            black = max(high[:, run.start : run.stop].flatten().tolist()) <= -1 + ALIKE
            warnings.append(_of_one_colour(name, run, length, black))
        elif _may_stand_still(low, high) and _moves(latent[number]) and _stands_still(video):
            warnings.append(coded("AV-1609", (
                f"{name}All {length} frames are the same, though their latent changes: check the VAE's file and dtype."
            )))  # fmt: skip
    return facts | {"warnings": warnings} if warnings else facts


def _longest_run(flags: list[bool], least: int) -> range | None:
    """Of True; None if it is shorter than `least`."""
    longest, start = range(0), 0
    for end, flag in enumerate([*flags, False]):
        if not flag:
            longest, start = max(longest, range(start, end), key=len), end + 1
    return longest if len(longest) >= least else None


def _of_one_colour(name: str, run: range, length: int, black: bool) -> str:
    colour = "black" if black else "of one colour"
    return coded("AV-1608", (
        f"{name}{_numbers(list(run), length)} {'is' if len(run) == 1 else 'are'} {colour}. If that is not meant, as in "
        "a fade: set the VAE's and the model's dtype to bfloat16, sample without caches and RainFusion, lower LoRAs' "
        f"strength, and check the files. On an NPU, {COMPARE}."
    ))  # fmt: skip


def _may_stand_still(low: Tensor, high: Tensor) -> bool:
    """Whether no channel's extremes, [C,T] each, change from frame to frame."""
    changes = [extremes.amax(1) - extremes.amin(1) for extremes in (low, high)]
    return low.shape[1] > 1 and bool((torch.cat(changes) <= ALIKE).all())


def _moves(latent: Tensor) -> bool:
    """Whether the second half of a latent [C,T,H,W] changes; the first frames differ also in those of a still video."""
    change = latent[:, -1] - latent[:, latent.shape[1] // 2]
    return bool(change.abs().max() > CHANGE * latent.std())


def _stands_still(video: Tensor) -> bool:
    """Whether frames [T,H,W,3] in 0..1 are all the same; looked at only if their extremes are."""
    return all(bool((frame - video[0]).abs().max() <= ALIKE / 2) for frame in video.flip(0)[:-1])


def _numbers(frames: list[int], length: int) -> str:
    """Frames counted from 0, in words."""
    first, last = frames[0] + 1, frames[-1] + 1
    return f"frame {first} of {length}" if first == last else f"frames {first} to {last} of {length}"


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


def _counted(on_step: StepReport, total: int) -> Callable[[], None]:
    numbers = count(1)
    return lambda: on_step(next(numbers), total)
