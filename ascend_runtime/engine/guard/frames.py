"""Whether what a VAE made is finite, and looks as a video does: from the extremes of its frames, which every rank notes
of its own tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import coded, coded_error
from ...models.shared.vae import VideoVae
from ...ops.finite import Extremes, Spread
from ...parallel.machines import machines
from ...parallel.mesh import all_reduce_max, all_reduce_max_of, this_rank, world_size
from .diagnosis import BAD, COMPARE, again, bad_weights, listed

DoneFacts = dict[str, Any]  # descriptions of the tiling, and warnings, for `Done.info`
ALIKE = 2 / 255  # what frames in -1..1 may differ by and look the same: a step of 8 bits
RUN = 4  # frames of one colour in a row that are reported: those of a latent's frame
LATENTS, FRAMES = 100.0, 10.0  # that no value of a latent, or of an image in 0..1, reaches
CHANGE = 0.05  # of a latent, in its standard deviations, that a moving picture exceeds


# Whether the values are finite


def agreed(seen: Extremes, out: Tensor, error: Callable[[str], ValueError]) -> Spread:
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
            f"{numbered(numbers, length)}, rows {top} to {bottom - 1}, columns {left} to {right - 1} (rank "
            f"{', '.join(map(str, who))})"
        )
    return Spread(-together[4].view(channels, length), together[3].view(channels, length), [])


def not_decoded(vae: VideoVae, latent: Tensor, where: str) -> ValueError:
    """Why decoded frames are not finite. Collective."""
    if weights := bad_weights(vae.network):
        return _broken_vae("decoded", where, weights)
    cure = _cure(vae, "latent", latent, LATENTS)
    return coded_error("AV-1606", f"The decoded video has {BAD} in {where}. {cure}")


def not_encoded(vae: VideoVae, frames: Tensor, where: str) -> ValueError:
    """Why an encoded latent is not finite. Collective."""
    if weights := bad_weights(vae.network):
        return _broken_vae("encoded", where, weights)
    cure = _cure(vae, "video", frames, FRAMES)
    return coded_error("AV-1607", f"The encoded video has {BAD} in the latent's {where}. {cure}")


def _broken_vae(work: str, where: str, weights: list[str]) -> ValueError:
    text = f"The {work} video has {BAD} in {where}, as the VAE has in {listed(weights)}. {again('the VAE file')}"
    return coded_error("AV-1602", text)


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


def with_warnings(facts: DoneFacts, spread: Spread, videos: Tensor, latent: Tensor) -> DoneFacts:
    """facts, with warnings about frames of one colour and about videos that do not move, of videos [B,T,H,W,3] whose
    extremes are known already. Rank 0 warns; if each machine has its own part of the videos, all ranks look at them."""
    if this_rank() != 0 and machines().count == 1:
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
            text = f"{name}All {length} frames are the same, though their latent changes."
            warnings.append(coded("AV-1609", f"{text} Check the VAE's file and dtype."))
    return facts | {"warnings": warnings} if warnings and this_rank() == 0 else facts


def _longest_run(flags: list[bool], least: int) -> range | None:
    """Of True; None if it is shorter than `least`."""
    longest, start = range(0), 0
    for end, flag in enumerate([*flags, False]):
        if not flag:
            longest, start = max(longest, range(start, end), key=len), end + 1
    return longest if len(longest) >= least else None


def _of_one_colour(name: str, run: range, length: int, black: bool) -> str:
    colour = "black" if black else "of one colour"
    text = (
        f"{name}{numbered(list(run), length)} {'is' if len(run) == 1 else 'are'} {colour}. If that is not meant, as in "
        "a fade: set the VAE's and the model's dtype to bfloat16, sample without caches and RainFusion, lower LoRAs' "
        f"strength, and check the files. On an NPU, {COMPARE}."
    )
    return coded("AV-1608", f"{text[0].upper()}{text[1:]}")


def _may_stand_still(low: Tensor, high: Tensor) -> bool:
    """Whether no channel's extremes, [C,T] each, change from frame to frame."""
    changes = [extremes.amax(1) - extremes.amin(1) for extremes in (low, high)]
    return low.shape[1] > 1 and bool((torch.cat(changes) <= ALIKE).all())


def _moves(latent: Tensor) -> bool:
    """Whether the second half of a latent [C,T,H,W] changes; the first frames differ also in those of a still video."""
    change = latent[:, -1] - latent[:, latent.shape[1] // 2]
    return bool(change.abs().max() > CHANGE * latent.std())


def _stands_still(video: Tensor) -> bool:
    """Whether frames [T,H,W,3] in 0..1 are all the same; looked at only if their extremes are. The first rank of each
    machine looks at what its machine has."""
    here = machines()
    still = not here.is_first or all(bool((frame - video[0]).abs().max() <= ALIKE / 2) for frame in video.flip(0)[:-1])
    return still if here.count == 1 else not all_reduce_max(not still)


def numbered(frames: list[int], length: int) -> str:
    """Frames counted from 0, in words."""
    first, last = frames[0] + 1, frames[-1] + 1
    return f"frame {first} of {length}" if first == last else f"frames {first} to {last} of {length}"
