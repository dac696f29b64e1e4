"""Chooses the fastest arrangement that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from ..errors import coded_error
from ..specs import VideoSize
from . import crossing, exchange, memory, seconds
from .choosing import words
from .choosing.arrangements import Fixed, arrangements, in_form, open_forms
from .choosing.sizes import video_size, with_fewer_frames, with_smaller_picture
from .facts import Arrangement, Machine, Memory, Model, Prediction, Video
from .rates import Rates
from .videos import resized

__all__ = ["Choice", "Fixed", "choose", "fits", "nearest_size", "nearest_sizes"]

NEARLY_FULL = 0.9  # of a card's memory: what a plan may take without being questioned
AS_FAST = 1.03  # plans whose seconds differ by less are as fast as each other: published rows are predicted as closely

MemoryOf = Callable[[Model, Video, Arrangement, Machine], Memory]


@dataclass(frozen=True)
class Choice:
    """fitting: the arrangements that fit, the fastest first, or another one that is chosen instead. others: those that
    do not fit. rates: in a few words, where the predicted seconds come from. why: the first one is chosen; empty: it is
    the fastest."""

    fitting: tuple[Prediction, ...]
    others: tuple[Prediction, ...] = ()
    machine: Machine | None = None
    rates: str = ""
    why: str = ""

    @property
    def chosen(self) -> Prediction:
        return self.fitting[0]

    @property
    def line(self) -> str:
        """What was chosen, why, and what it is predicted to take, in one line."""
        return words.line(self.fitting, self.others, self.machine, self.rates, self.why)


def choose(model: Model, video: Video, machine: Machine, rates: Rates, fixed: Fixed = Fixed()) -> Choice:
    """Nothing that changes a video's values is ever chosen, but blended tiles of the VAE if the whole plane does not
    fit. Raises ValueError, with the numbers and the nearest size that fits, if nothing fits."""
    choice = choice_of(model, video, machine, rates, fixed)
    if not choice.fitting:
        raise refusal(model, video, machine, fixed, choice.others)
    return choice


def choice_of(
    model: Model, video: Video, machine: Machine, rates: Rates, fixed: Fixed = Fixed(),
    held: MemoryOf = memory.predicted,
) -> Choice:  # fmt: skip
    """As `choose`, with nothing in `fitting` if nothing fits. held: predicts the memory."""
    found: list[Prediction] = []
    for tiles, packed in open_forms(model, machine, fixed):
        made = in_form(arrangements(model, video, machine, fixed, tiles), model, packed)
        found += [prediction(model, video, one, machine, rates, held) for one in made]
        if any(fits(one.memory, machine) for one in found):
            break
    fitting = sorted((one for one in found if fits(one.memory, machine)), key=_speed)
    others = tuple(one for one in found if not fits(one.memory, machine))
    roomy = _roomier(fitting, machine)
    why = words.instead(fitting[0], "it leaves room on the cards") if roomy else ""
    first = [roomy] if roomy else []
    return Choice((*first, *(one for one in fitting if one is not roomy)), others, machine, words.source(rates), why)


def _roomier(fitting: Sequence[Prediction], machine: Machine) -> Prediction | None:
    """What is chosen instead of the fastest, if that would fill the cards and is hardly faster: the one that takes the
    least of what there is, as what kernels take of a card is not measured, and memory that runs out costs a second try.
    None: the fastest is chosen."""
    if machine.kind == "cpu" or not fitting or fitting[0].memory.device_peak <= NEARLY_FULL * machine.device_memory:
        return None
    near = [one for one in fitting if _speed(one) <= AS_FAST * _speed(fitting[0])]
    least = min(near, key=lambda one: excess(one.memory, machine))
    return least if least.memory.device_peak <= NEARLY_FULL * machine.device_memory else None


def prediction(
    model: Model, video: Video, one: Arrangement, machine: Machine, rates: Rates, held: MemoryOf = memory.predicted
) -> Prediction:
    return Prediction(
        arrangement=one,
        seconds=seconds.predicted(model, video, one, machine, rates),
        memory=held(model, video, one, machine),
        sent=exchange.sent(model, video, one),
        read=seconds.bytes_read(model),
        between=crossing.between(model, video, one, machine),
    )


def _speed(one: Prediction) -> float:
    """The seconds of a job whose weights are loaded, in 3 digits: what is equal in these is left in its order."""
    return float(f"{one.running:.3g}")


def fits(taken: Memory, machine: Machine) -> bool:
    """Whether a job's memory fits. On a CPU the memory of its ranks is the host's."""
    return excess(taken, machine) <= 1


def excess(taken: Memory, machine: Machine) -> float:
    """What is needed of what there is; above 1 it does not fit."""
    on_host = taken.host_total + (machine.host_ranks * taken.device_peak if machine.kind == "cpu" else 0)
    return max(taken.device_peak / max(machine.device_memory, 1), on_host / max(machine.host_memory, 1))


def crossing_warning(
    one: Prediction, model: Model, video: Video, machine: Machine, rates: Rates, fixed: Fixed,
    held: MemoryOf = memory.predicted,
) -> str:  # fmt: skip
    """What it costs that Ulysses or tensor parallelism of a plan crosses machines, and what another plan costs; empty
    if neither does."""
    plan, hosts = one.arrangement.plan, machine.hosts
    if machine.link is None or plan.is_within(hosts):
        return ""
    slices = 1 if plan.crosses("tp", hosts) else plan.tp
    left_open = msgspec.structs.replace(
        fixed.parallel, cfg_degree=0, ring_degree=0, ulysses_degree=0, tp_degree=slices
    )
    others = choice_of(model, video, machine, rates, replace(fixed, parallel=left_open), held).fitting
    within = (other for other in others if other.arrangement.plan.is_within(hosts))
    return words.cost_of_crossing(one, machine, next(within, None))


def nearest_size(model: Model, video: Video, machine: Machine, fixed: Fixed = Fixed()) -> VideoSize | None:
    """The largest video of about the same proportions that fits, with fewer frames or smaller ones; None: no video
    does."""
    found = [one for one in nearest_sizes(model, video, machine, fixed) if one is not None]
    return max(found, key=lambda one: one.width * one.height * one.num_frames, default=None)


def nearest_sizes(
    model: Model, video: Video, machine: Machine, fixed: Fixed = Fixed()
) -> tuple[VideoSize | None, VideoSize | None]:
    """(the same picture with the most frames that fit, the same number of frames with the largest picture that
    fits)."""
    form = model.family.form(model.experts[0].config)
    smallest, packed = open_forms(model, machine, fixed)[-1]  # nothing takes less

    def is_fitting(size: VideoSize) -> bool:
        other = resized(model, video, size)
        made = in_form(arrangements(model, other, machine, fixed, smallest), model, packed)
        return any(fits(memory.predicted(model, other, one, machine), machine) for one in made)

    size = video_size(video, form)
    return with_fewer_frames(size, form, is_fitting), with_smaller_picture(size, form, is_fitting)


def refusal(
    model: Model, video: Video, machine: Machine, fixed: Fixed, others: tuple[Prediction, ...]
) -> ValueError:
    """The error for a video that fits in no way. others: all arrangements, none of which fits."""
    least = min(others, key=lambda one: excess(one.memory, machine))
    size = video_size(video, model.family.form(model.experts[0].config))
    near = nearest_sizes(model, video, machine, fixed)
    return coded_error("AV-1210", words.no_fit(model.defaults.name, size, machine, least, near))
