"""Predicts the seconds of each stage of a job."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from .crossing import gathered_seconds, more_seconds, sent_seconds
from .exchange import Exchange, Step, exchanges, step_of
from .facts import Arrangement, Machine, Model, Video
from .rates import EXCHANGES, Rates
from .timing import work
from .timing.skipped import StepPart, kept_in_steps

Amounts = Mapping[str, float]  # by unit, see rates.UNITS
OVERLAPPED = 0.5  # the part of Ulysses' exchanges that runs while attention does, if they overlap
PROMPTS_OF_A_JOB = 2


def predicted(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rates: Rates
) -> Mapping[str, float]:
    """By stage: "load" (all files, from disk), "encode" (both prompts), "denoise", "decode".

    A stage takes the sum of its amounts, each times its cost (see `rates.UNITS`); of the rank that has most to do:
        load: bytes of all files, and bytes that a rank puts into place;
        encode: FLOPs of the text encoders on the host, or a rank's part of them;
        denoise, for each step: FLOPs of attention's products and of the other matrix products, bytes of tokens between
            blocks, a constant for each block, each exchange and the step, and bytes sent along each axis; for each
            change of an expert that waits on the host, its bytes;
        decode: FLOPs of the VAE for the largest tile, and bytes of frames;
    and a constant for each stage. Guidance in series takes both branches' passes. Where exchanges run while a rank
    computes (`Rates.hides`), only what they take longer counts (see `_hidden`). Exchanges between machines take what
    the link does; each machine reads files from its own disk.
    """
    costs = rates.on(machine.host_ranks if machine.hosts else math.prod(arrangement.plan.degrees))
    seconds = {stage: total(of, costs) for stage, of in amounts(model, video, arrangement).items()}
    if rates.hides or machine.link:
        for step, kept, times in _kinds_of_steps(model, video, arrangement):
            for exchange in exchanges(step):
                more = more_seconds(exchange, step.plan, machine, costs)
                more -= _hidden(exchange, step, machine, costs) if rates.hides else 0.0
                seconds["denoise"] += times * work.share_taken(exchange, kept) * more
    if machine.hosts:
        seconds["load"] -= costs["read"] * _read_elsewhere(model, arrangement, machine)
    if arrangement.encoder == "ranks":
        seconds["encode"] += PROMPTS_OF_A_JOB * gathered_seconds(model.encoders, model.text_dtype, machine)
    return seconds


def total(amounts: Amounts, costs: Mapping[str, float]) -> float:
    """The seconds of amounts with these costs."""
    return sum(amount * costs[unit] for unit, amount in amounts.items())


def amounts(model: Model, video: Video, arrangement: Arrangement) -> Mapping[str, Amounts]:
    """What each stage takes, by unit."""
    return {
        "load": _load(model, arrangement),
        "encode": _encode(model, video, arrangement),
        "denoise": of_denoising(model, video, arrangement),
        "decode": of_decoding(model, video, arrangement),
    }


def bytes_read(model: Model) -> int:
    """Bytes of all files of a job. Of the ranks on a host, one reads them from disk; the others find them in memory."""
    return sum(work.stored_bytes(network, dtype) for network, dtype in _networks(model))


def of_denoising(model: Model, video: Video, arrangement: Arrangement) -> Amounts:
    passes = video.passes[video.computed]
    found = Counter({"denoise_job": 1, "steps": len(passes)})
    for step, kept, times in _kinds_of_steps(model, video, arrangement):
        for unit, amount in work.of_step(step, kept).items():
            found[unit] += times * amount
        for exchange in exchanges(step):
            takes_place = times * work.share_taken(exchange, kept)
            found[exchange.axis] += takes_place * exchange.sent
            found[EXCHANGES[exchange.axis]] += takes_place * exchange.times
    if arrangement.experts == "swap":
        turns = sum(one != other for (one, _), (other, _) in zip(passes, passes[1:]))
        found["swap"] = turns * work.kept_bytes(model.experts[0], model.dtype, arrangement.packed) / arrangement.plan.tp
    return found


def of_decoding(model: Model, video: Video, arrangement: Arrangement) -> Amounts:
    if model.vae is None:
        return {}
    form = model.family.vae_form(model.vae.config)
    shared = arrangement.tiles == "whole" or model.family.deals_tiles
    sharing = math.prod(arrangement.plan.degrees) if shared else 1
    return {
        "decode_job": 1,
        "decode": work.decoding_flops(model.vae, model.family, video.shape, sharing),
        "frames": 4.0 * math.prod(form.decoded_shape(video.shape)),  # in fp32
    }


def _load(model: Model, arrangement: Arrangement) -> Amounts:
    plan = arrangement.plan
    parts = math.prod(plan.degrees) if arrangement.fsdp else plan.tp
    copied = sum(work.kept_bytes(network, model.dtype, arrangement.packed) for network in model.experts) / parts
    copied += sum(work.kept_bytes(network, dtype) for network, dtype in _networks(model)[len(model.experts) :])
    return {"load_job": 1, "read": float(bytes_read(model)), "copied": copied}


def _encode(model: Model, video: Video, arrangement: Arrangement) -> Amounts:
    flops = PROMPTS_OF_A_JOB * sum(work.encoding_flops(encoder, video.text_tokens) for encoder in model.encoders)
    if arrangement.encoder == "cpu":
        return {"encode_job": PROMPTS_OF_A_JOB, "encode": flops}
    return {"encode_job": PROMPTS_OF_A_JOB, "encode_ranks": flops / math.prod(arrangement.plan.degrees)}


def _networks(model: Model) -> list[tuple]:
    """(network, dtype) of the experts, the text encoders and the VAE."""
    found = [(network, model.dtype) for network in model.experts]
    found += [(network, model.text_dtype) for network in model.encoders]
    return found + ([(model.vae, model.vae_dtype)] if model.vae is not None else [])


def _kinds_of_steps(model: Model, video: Video, arrangement: Arrangement) -> Iterator[tuple[Step, StepPart, int]]:
    """The kinds of steps, what accelerators keep of each, and the number of each."""
    config = model.experts[0].config
    size = step_of(model, video, arrangement).size
    steps = list(zip(video.passes, kept_in_steps(video, model.family.work(config, size))))
    kinds = Counter(steps[video.computed])
    for ((expert, branches), kept), times in kinds.items():
        yield step_of(model, video, arrangement, expert, branches), kept, times


def _read_elsewhere(model: Model, arrangement: Arrangement, machine: Machine) -> float:
    """Bytes of files that ranks of other machines read: their shards."""
    sharded = [(one, model.dtype) for one in model.experts] if arrangement.fsdp else []
    sharded += [(one, model.text_dtype) for one in model.encoders] if arrangement.encoder == "ranks" else []
    return (1 - machine.host_ranks / machine.ranks) * sum(work.stored_bytes(*one) for one in sharded)


def _hidden(exchange: Exchange, step: Step, machine: Machine, costs: Mapping[str, float]) -> float:
    """The part of an exchange's seconds in which a rank computes.

    Half of Ulysses' if it overlaps; a ring's as long as the attention meanwhile; gathered weights', but for the first
    unit, as long as all computation.
    """
    seconds = sent_seconds(exchange, step.plan, machine, costs)
    if exchange.axis == "ulysses" and step.arrangement.overlap:
        return seconds * OVERLAPPED
    if exchange.axis == "ring":
        attention = work.of_step(step)["merged"] * costs["merged"]
        return min(seconds, attention * (step.plan.ring - 1) / step.plan.ring)
    if exchange.axis == "fsdp":
        return min(seconds * step.blocks / (step.blocks + 1), total(work.of_step(step), costs))
    return 0.0
