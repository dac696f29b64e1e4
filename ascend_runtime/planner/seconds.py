"""Predicts the seconds of each stage of a job."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from ..specs.plans import AXES
from .timing import work
from .exchange import Exchange, Step, exchanges, step_of
from .facts import Arrangement, Machine, Model, Video
from .rates import Rates

Amounts = Mapping[str, float]  # by unit, see rates.UNITS
OVERLAPPED = 0.5  # the part of Ulysses' exchanges that runs while attention does, if they overlap
PROMPTS_OF_A_JOB = 2


def predicted(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rates: Rates
) -> Mapping[str, float]:
    """By stage: "load" (all files, from disk), "encode" (both prompts), "denoise", "decode".

    Each stage takes the sum of its amounts (see `amounts`), each times its cost (`rates.Rates`). A step of the denoise
    loop, on the rank that has most to do, takes
        products + linear + traffic + blocks + steps: FLOPs of attention's products, of the other matrix products, bytes
            of tokens between blocks, and a constant for each block and step,
        + the bytes sent along each axis, and a constant for each exchange,
    and guidance in series takes both branches' passes. Where exchanges run while a rank computes (`Rates.hides`), a
    ring's count only as far as they take longer than the attention meanwhile, gathers of weights as far as they take
    longer than all computation, and half of Ulysses' if they overlap.
    """
    found = amounts(model, video, arrangement)
    costs = rates.on(math.prod(arrangement.plan.degrees))
    seconds = {stage: _total(found[stage], costs) for stage in found}
    seconds["denoise"] += sum(_exchanged(*part, rates, costs) for part in _parts(model, video, arrangement))
    return seconds


def amounts(model: Model, video: Video, arrangement: Arrangement) -> Mapping[str, Amounts]:
    """What each stage takes, by unit, without exchanges."""
    ranks = math.prod(arrangement.plan.degrees)
    decoders = ranks if arrangement.tiles == "whole" else 1
    denoise = Counter()
    for step, times in _parts(model, video, arrangement):
        for unit, amount in work.of_step(step).items():
            denoise[unit] += times * amount
    denoise["steps"] = video.steps
    if arrangement.experts == "swap":
        turns = sum(one != other for (one, _), (other, _) in zip(video.passes, video.passes[1:]))
        denoise["swap"] = turns * work.kept_bytes(model.experts[0], model.dtype)
    flops = PROMPTS_OF_A_JOB * sum(work.of_encoding(encoder, video.text_tokens) for encoder in model.encoders)
    encode = {"encode": flops} if arrangement.encoder == "cpu" else {"encode_ranks": flops / ranks}
    decode = {}
    if model.vae is not None:
        batch, _, frames, height, width = model_frames(model, video)
        decode = {
            "decode": work.of_decoding(model.vae, model.family, video.shape, decoders),
            "frames": batch * 4.0 * 3 * frames * height * width,
        }
    return {
        "load": {"read": float(bytes_read(model)), "jobs": 1},
        "encode": {**encode, "jobs": PROMPTS_OF_A_JOB},
        "denoise": {**denoise, "jobs": 1},
        "decode": {**decode, "jobs": 1},
    }


def bytes_read(model: Model) -> int:
    """Bytes of all files of a job. Ranks on one host read each from disk once; the others find it in memory."""
    networks = [(network, model.dtype) for network in model.experts]
    networks += [(network, model.text_dtype) for network in model.encoders]
    networks += [(model.vae, model.vae_dtype)] if model.vae is not None else []
    return sum(work.stored_bytes(network, dtype) for network, dtype in networks)


def model_frames(model: Model, video: Video) -> tuple[int, int, int, int, int]:
    """[B,3,T,H,W] of the frames."""
    form = model.family.vae_form(model.vae.config)
    batch, _, frames, height, width = video.shape
    return batch, 3, (frames - 1) * form.temporal + 1, height * form.spatial, width * form.spatial


def _parts(model: Model, video: Video, arrangement: Arrangement) -> Iterator[tuple[Step, int]]:
    """The kinds of steps, and the number of each."""
    for (expert, branches), times in Counter(video.passes).items():
        yield step_of(model, video, arrangement, expert, branches), times


def _exchanged(step: Step, times: int, rates: Rates, costs: Mapping[str, float]) -> float:
    """The seconds of exchanges in all steps of a kind, as far as they do not run while a rank computes."""
    computing = work.of_step(step)
    total = 0.0
    for exchange in exchanges(step):
        seconds = exchange.sent * max(costs[exchange.axis], rates.pair / _peers(exchange, step))
        if rates.hides:
            seconds = _exposed(seconds, exchange, step, computing, costs)
        total += seconds + exchange.times * costs["exchanges"]
    return times * total


def _peers(exchange: Exchange, step: Step) -> int:
    """The number of ranks to which a rank sends at once."""
    if exchange.axis == "ring" and exchange.operation == "send":
        return 1
    ranks = math.prod(step.plan.degrees)
    sizes = {"sequence": step.degree, "fsdp": ranks // step.plan.tp, **dict(zip(AXES, step.plan.degrees))}
    return sizes[exchange.axis] - 1


def _exposed(
    seconds: float, exchange: Exchange, step: Step, computing: Amounts, costs: Mapping[str, float]
) -> float:
    """The part of an exchange's seconds in which a rank waits."""
    if exchange.axis == "ulysses" and step.arrangement.overlap:
        return seconds * (1 - OVERLAPPED)
    if exchange.axis == "ring":
        return max(0.0, seconds - computing["products"] * costs["products"] * (step.plan.ring - 1) / step.plan.ring)
    if exchange.axis == "fsdp":  # the first unit is gathered before anything computes
        units = step.blocks + 1
        return seconds / units + max(0.0, seconds * (units - 1) / units - _total(computing, costs))
    return seconds


def _total(amounts: Amounts, costs: Mapping[str, float]) -> float:
    return sum(amount * costs[unit] for unit, amount in amounts.items())
