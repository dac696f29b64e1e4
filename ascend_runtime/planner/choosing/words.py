"""The words for a choice, and for a video that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...specs import Plan, VideoSize
from ...specs.plans import AXES, WITHIN_MACHINES
from ..facts import Arrangement, Machine, Memory, Prediction
from ..rates import Rates
from .arrangements import PUBLISHED

NAMES = {"cfg": "CFG", "ring": "ring", "ulysses": "Ulysses", "tp": "TP"}


def line(
    fitting: Sequence[Prediction], others: Sequence[Prediction], machine: Machine | None, rates: str, why: str = ""
) -> str:  # fmt: skip
    """What was chosen, why, and what it is predicted to take. fitting: at least one, the chosen one first. why: it is
    chosen; empty: it is the fastest."""
    chosen = fitting[0]
    what, why = _described(chosen), why or _reason(fitting, others)
    return f"{what}: {why}. Predicted: {predicted_to_take(chosen, machine)}; {rates}."


def instead(faster: Prediction, why: str) -> str:
    """The reason for an arrangement that is not the fastest one that fits."""
    return f"{why}, though {_described(faster)} fits and is faster"


def _described(one: Prediction) -> str:
    return arrangement(one.arrangement, "encode" in one.seconds)


def degrees(plan: Plan) -> str:
    """Such as "CFG 2 x Ulysses 4"."""
    more = [f"{NAMES[axis]} {degree}" for axis, degree in zip(AXES, plan.degrees) if degree > 1]
    return " x ".join(more) or "one rank"


def arrangement(one: Arrangement, encodes: bool = True) -> str:
    """Such as "CFG 2 x Ulysses 4, FSDP, experts in turns, text encoder on the ranks". encodes: whether the job does."""
    parts = [degrees(one.plan)]
    parts += ["FSDP"] * one.fsdp + ["experts in turns"] * (one.experts == "swap")
    parts += ["weights as the GGUF file has them"] * one.packed
    parts += [f"text encoder on the {'ranks' if one.encoder == 'ranks' else 'CPU'}"] * encodes
    return ", ".join(parts + ["VAE in blended tiles"] * (one.tiles == PUBLISHED))


def source(rates: Rates) -> str:
    """In a few words, where rates come from."""
    what, _, _ = rates.source.partition(":")
    return what if rates.measured else f"by {what}, not measured here"


def duration(seconds: float) -> str:
    """Such as "2 h 5 min", "4 min 10 s", "12 s", "0.4 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def predicted_to_take(one: Prediction, machine: Machine | None) -> str:
    """Seconds, and memory of what there is."""
    denoise, load = (duration(one.seconds.get(stage, 0.0)) for stage in ("denoise", "load"))
    device, host = gigabytes(one.memory.device_peak), gigabytes(one.memory.host_total)
    if machine is not None:
        device = f"{device} of {gigabytes(machine.device_memory)}"
        host = f"{host} of {gigabytes(machine.host_memory)}"
    where = "rank" if machine is None or machine.kind == "cpu" else "card"
    times = f"{duration(one.running)} ({denoise} to denoise), {load} to load first"
    which = "the host" if machine is None or machine.host_count == 1 else "a host"
    sent = f"; {between_machines(one, machine)}" if one.between.sent else ""
    return f"{times}; {device} a {where}, {host} of {which}{sent}"


def between_machines(one: Prediction, machine: Machine) -> str:
    """What a machine sends to others, and the seconds of it, such as "1.2 GB a step between machines, about 9.6 s at
    the measured 1 Gbit/s"."""
    return f"{gigabytes(one.between.sent)} a step between machines, about {_link_seconds(one)} at {machine.link}"


def _link_seconds(one: Prediction) -> str:
    seconds = one.between.seconds
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def cost_of_crossing(one: Prediction, machine: Machine, within: Prediction | None) -> str:
    """The warning for a plan whose inner axes cross machines. within: the fastest one that fits and whose inner axes
    do not; None: there is none."""
    plan = one.arrangement.plan
    axes = [axis for axis in WITHIN_MACHINES if plan.crosses(axis, machine.hosts)]
    named = " and ".join(f"{NAMES[axis]} {getattr(plan, axis)}" for axis in axes)
    verb = "crosses" if len(axes) == 1 else "cross"
    said = f"{named} {verb} machines: the plan sends {between_machines(one, machine)}."
    if within is None:
        return said
    other = f"{degrees(within.arrangement.plan)} would send {gigabytes(within.between.sent)}, {_link_seconds(within)}"
    return f"{said} {other}; set the degrees to that, or to 0 (tp_degree to 1) for automatic."


def _reason(fitting: Sequence[Prediction], others: Sequence[Prediction]) -> str:
    chosen, count = fitting[0], len(fitting) + len(others)
    if count == 1:
        return "the only arrangement that was left open, and it fits"
    text = f"the fastest of {len(fitting)} that fit" if len(fitting) > 1 else f"the only one of {count} that fits"
    if len(fitting) > 1 and not others:
        text = f"the fastest of {count}, which all fit"
    ways = _why_not(chosen, others)
    return f"{text} ({ways})" if ways else text


def _why_not(chosen: Prediction, others: Sequence[Prediction]) -> str:
    """What the fastest arrangement that does not fit would take, if it is faster than the chosen one."""
    faster = [one for one in others if one.running < chosen.running]
    if not faster:
        return ""
    one = min(faster, key=lambda other: other.running)
    return f"{_described(one)} would need {gigabytes(one.memory.device_peak)} a card"


def no_fit(
    name: str, size: VideoSize, machine: Machine, least: Prediction, near: tuple[VideoSize | None, VideoSize | None]
) -> str:
    """Why a video is refused. least: the arrangement that comes nearest to fitting. near: the sizes that fit, with
    fewer frames and with a smaller picture."""
    frames, picture = near
    options = [_video(one) for one in (frames, picture) if one]
    cure = f"What fits: {' or '.join(dict.fromkeys(options))}." if options else (
        "No size fits: the weights do not. Use more cards, cards or a host with more memory, quantization, or files in "
        "8 bits."
    )  # fmt: skip
    ranks = f"{machine.ranks} rank(s) on the CPU" if machine.kind == "cpu" else f"{machine.ranks} x {machine.card}"
    host = "the host" if machine.host_count == 1 else f"each of {machine.host_count} hosts"
    return (
        f"No plan fits {name}, {_video(size)}, on {ranks} with "
        f"{gigabytes(machine.device_memory)} each and {gigabytes(machine.host_memory)} of {host}. "
        f"{arrangement(least.arrangement)} comes nearest: {shortfall(least, machine)} {cure}"
    )


def _video(size: VideoSize) -> str:
    return f"{size.width} x {size.height} with {size.num_frames} frame{'s' * (size.num_frames != 1)}"


def shortfall(one: Prediction, machine: Machine) -> str:
    """What an arrangement needs where there is less."""
    stage, where = peak_stage(one.memory), "rank" if machine.kind == "cpu" else "card"
    parts = [f"it needs {gigabytes(one.memory.device_peak)} a {where} to {stage} "
             f"({_listed(one.memory.device[stage])})"]  # fmt: skip
    if one.memory.host_total > machine.host_memory or machine.kind == "cpu":
        parts.append(f"{gigabytes(one.memory.host_total)} of the host ({_listed(one.memory.host)})")
    return " and ".join(parts) + "."


def peak_stage(memory: Memory) -> str:
    return max(memory.device, key=lambda stage: sum(memory.device[stage].values()))


def _listed(parts: Mapping[str, int]) -> str:
    """The largest parts of a sum of bytes."""
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{what} {gigabytes(number)}" for what, number in largest if number)
