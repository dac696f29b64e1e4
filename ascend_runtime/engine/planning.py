"""Chooses the plan of a job that is about to run, from its files' headers and the memory that the ranks have free."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..hardware import devices
from ..planner import choice, memory, models, videos
from ..planner.choice import Choice, Fixed
from ..planner.choosing import encoders, words
from ..planner.facts import Arrangement, Machine, Model, Prediction, Video
from ..planner.rates import Rates, gpu_named, of_card
from ..planner.timing.profile import rates_for
from ..specs import AccelerationSpec, DiffusionModelSpec, ParallelSpec, Plan, TextEncoderSpec, VaeForm, VideoSize
from ..specs.plans import AXES
from ..wire.plans import Chosen, PlannedJob

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LEAST_VIDEO = VideoSize(width=256, height=256, num_frames=5)  # to load a model whose own size does not fit
MOST_MODELS = 4  # whose facts are kept
NEGLIGIBLE = 16  # jobs that take less than a 16th of a device are not predicted exactly

Holds = Callable[[DiffusionModelSpec, int, bool], bool]  # whether the ranks hold a model (spec, tp degree, FSDP)


def card_of(device: torch.device) -> str:
    """The name of a card in planner.rates; of an unknown card, that of the most common one of its kind."""
    if device.type == "npu":
        line = devices.card(device)
        return {"a5": "950", None: "a2"}.get(line, line)
    if device.type == "cuda":
        return gpu_named(devices.name(device))
    return "cpu"


def placement(spec: TextEncoderSpec, machine: Machine) -> str:
    """Where text encoders run whose place is left open. machine: what is free next to all that is loaded."""
    try:
        family, found = models.text_encoders(spec)
        return encoders.place(found, machine, _rates(spec.path, machine, family.name))
    except ValueError as error:  # loading says what is wrong with the files
        logger.info("The text encoder's place is not chosen: %s", error)
        return encoders.CPU


def encoder_bytes(spec: TextEncoderSpec, ranks: int) -> int:
    """The bytes that text encoders take of each rank's device. Raises ValueError for files that cannot be used."""
    return encoders.bytes_on_ranks(models.text_encoders(spec)[1], ranks)


def _rates(path: str, machine: Machine, family: str) -> Rates:
    """What was measured on this host next to the model at `path`, with this number of ranks; else published figures."""
    try:
        return rates_for(path, machine.kind, machine.card, family, machine.host_ranks)
    except ValueError as error:  # a job does not depend on it
        logger.warning("%s Published figures are used.", error)
        return of_card(machine.card)


class KnownModels:
    """The facts of the models that were asked about last, as long as their files stay as they were. state: a value that
    changes when a file of a spec's component does."""

    def __init__(self, state: Callable[[Any], Hashable]):
        self._state = state
        self._read: OrderedDict[tuple, Model] = OrderedDict()

    def of(self, planned: PlannedJob, kind: str) -> Model:
        """Raises ValueError for files that cannot be used."""
        specs = replace(planned.model, loras=()), planned.encoder, planned.vae
        key = specs, tuple(spec and self._state(spec) for spec in specs)
        if key not in self._read:
            self._read[key] = models.read(*specs, kind)
        self._read.move_to_end(key)
        while len(self._read) > MOST_MODELS:
            self._read.popitem(last=False)
        model = self._read[key]
        return replaced(model, lora_numbers=models.lora_numbers(planned.model.loras, len(model.experts)))


def plan_for(
    planned: PlannedJob, machine: Machine, facts: KnownModels, holds: Holds, below: int = 0, below_host: int = 0
) -> Chosen | None:
    """The plan of a job; if bytes are given, of those that take less of a device, and of the host. None: there is none.

    A plan whose weights would have to be read counts the seconds of reading, where a slower one finds its weights on
    the ranks. Raises ValueError, with the numbers and the nearest size that fits, if no plan fits.
    """
    less = below or below_host
    try:
        model = facts.of(planned, machine.kind)
    except ValueError as error:  # loading says more, and fails for what cannot be loaded only
        logger.info("No plan was chosen: %s", error)
        return None if less else _not_chosen(planned, f"No plan was chosen: {error}")
    video = _video(model, planned)
    if video is None:
        return None if less else _not_chosen(planned, "No plan was chosen, as the latent is not a video's.")
    found = _choice(model, video, planned, machine)
    if not found.fitting and not found.others:
        return None if less else _not_chosen(planned, "No plan was chosen, as none is possible with what was set.")
    if not found.fitting:
        return None if less else _as_set(found.others[0], model, video, planned, machine)
    picked = _picked(_smaller(found, below, below_host), planned, model, holds)
    if picked is None:
        return None
    others, first = tuple(one for one in found.fitting if one is not picked), found.fitting[0]
    why = "" if picked is first else words.instead(first, "it takes less" if less else "its weights are on the ranks")
    line = replaced(found, fitting=(picked, *others), why=why).line
    return replace(_answer(picked, line, planned, machine, model),
                   warning=_crossing_warning(picked, model, video, planned, machine))  # fmt: skip


def _is_set(parallel: ParallelSpec) -> bool:
    """Whether the user has left nothing to choose."""
    degrees = parallel.cfg_degree, parallel.ring_degree, parallel.ulysses_degree
    return all(degrees) and parallel.fsdp is not None


def _as_set(one: Prediction, model: Model, video: Video, planned: PlannedJob, machine: Machine) -> Chosen:
    """The plan that the user has set, which is predicted not to fit. It runs, as a prediction can be too high."""
    said = words.arrangement(one.arrangement, encodes=bool(model.encoders))
    line = f"{said}: as it was set, though it is predicted not to fit: {words.shortfall(one, machine)}"
    warning = _crossing_warning(one, model, video, planned, machine)
    return replace(_answer(one, line, planned, machine, model), short=True, warning=warning)


def _crossing_warning(one: Prediction, model: Model, video: Video, planned: PlannedJob, machine: Machine) -> str:
    known = _rates(planned.model.path, machine, model.family.name)
    held = memory.roughly if _is_small(model, video, machine) else memory.predicted
    return choice.crossing_warning(one, model, video, machine, known, _fixed(planned), held)


def _fixed(planned: PlannedJob) -> Fixed:
    return Fixed(
        planned.parallel, planned.model.experts,
        planned.encoder.placement if planned.encoder else "cpu", planned.vae.tiles if planned.vae else "whole",
        planned.model.packed,
    )  # fmt: skip


def _choice(model: Model, video: Video, planned: PlannedJob, machine: Machine) -> Choice:
    fixed, known = _fixed(planned), _rates(planned.model.path, machine, model.family.name)
    held = memory.roughly if _is_small(model, video, machine) else memory.predicted
    found = choice.choice_of(model, video, machine, known, fixed, held)
    if not found.fitting and planned.shape is None and planned.size is None:  # weights, for a video to come
        video = _video(model, replace(planned, size=LEAST_VIDEO))
        found = choice.choice_of(model, video, machine, known, fixed)
    if found.others and not found.fitting and not _is_set(planned.parallel):
        raise choice.refusal(model, video, machine, fixed, found.others)
    return replaced(found, fitting=tuple(_of_stages(one, model) for one in found.fitting))


def _is_small(model: Model, video: Video, machine: Machine) -> bool:
    """Whether a job takes so little of a device that all its plans fit, which needs no exact prediction."""
    if video.acceleration != AccelerationSpec() or model.vae is not None or model.encoders:
        return False
    taken = memory.roughly(model, video, Arrangement(Plan()), machine)
    fits = NEGLIGIBLE * taken.device_peak <= machine.device_memory
    return fits and NEGLIGIBLE * taken.host_total <= machine.host_memory


def _of_stages(one: Prediction, model: Model) -> Prediction:
    """The prediction without the stages of networks that are not asked about."""
    absent = {stage for stage, part in (("encode", model.encoders), ("decode", model.vae)) if not part}
    return replaced(one, seconds={stage: taken for stage, taken in one.seconds.items() if stage not in absent})


def _smaller(found: Choice, device: int, host: int) -> list[Prediction]:
    """Those that fit and take less than these bytes; 0: as much as they like."""
    fitting = (one for one in found.fitting if not device or one.memory.device_peak < device)
    return [one for one in fitting if not host or one.memory.host_total < host]


def _picked(fitting: list[Prediction], planned: PlannedJob, model: Model, holds: Holds) -> Prediction | None:
    """The first of the fitting ones, unless another one is sooner done as it finds its weights on the ranks."""
    if not fitting:
        return None

    def is_held(one: Prediction) -> bool:
        arrangement = one.arrangement
        spec = replace(planned.model, **_kept(planned, arrangement, model), loras=())
        return holds(spec, arrangement.plan.tp, arrangement.fsdp)

    first, held = fitting[0], next(filter(is_held, fitting), None)
    if held is None or held is first:
        return first
    return held if held.running <= first.running + first.seconds.get("load", 0.0) else first


def _kept(planned: PlannedJob, arrangement: Arrangement, model: Model) -> dict[str, Any]:
    """How a model's weights are kept, as its spec has it."""
    given, can_be_packed = planned.model, any(one.packed for one in model.experts)
    return {
        "experts": arrangement.experts if len(model.experts) == 2 else given.experts,
        "packed": arrangement.packed if can_be_packed else given.packed,
    }


def _video(model: Model, planned: PlannedJob) -> Video | None:
    """The video of a job; None if its latent has a shape that this model refuses."""
    form = model.family.form(model.experts[0].config)
    shape = _whole_tokens(planned, form) or form.latent_shape(planned.size or model.defaults.size)
    is_video = len(shape) == 5 and all(shape) and shape[1] == form.channels
    if not is_video or any(side * form.spatial % form.multiple for side in shape[3:]):
        return None
    video = videos.of_latent(model, tuple(shape), planned.sample, planned.acceleration, planned.per_token)
    passes = video.passes
    if planned.branches:
        passes = tuple((expert, planned.branches) for expert, _ in passes)
    return replaced(video, passes=passes, text_tokens=max(1, planned.text_tokens))


def _whole_tokens(planned: PlannedJob, form: VaeForm) -> tuple[int, ...] | None:
    """The shape of the job's latent. Those of model calls are padded to whole tokens."""
    if planned.shape is None or not planned.branches:
        return planned.shape
    token = form.multiple // form.spatial
    *before, height, width = planned.shape
    return (*before, -(-height // token) * token, -(-width // token) * token)


def _answer(one: Prediction, line: str, planned: PlannedJob, machine: Machine, model: Model) -> Chosen:
    arrangement, memory = one.arrangement, one.memory
    denoise = memory.device.get("denoise", {})
    return Chosen(
        parallel=_parallel(planned, arrangement.plan, arrangement.fsdp),
        **_kept(planned, arrangement, model),
        encoder=arrangement.encoder,
        tiles=arrangement.tiles,
        line=line,
        seconds=dict(one.seconds),
        sent=dict(one.sent),
        device=memory.device_peak,
        device_free=machine.device_memory,
        host=memory.host_total,
        host_free=machine.host_memory,
        computing=sum(denoise.values()) - denoise.get("weights", 0) - denoise.get("loras", 0),
    )


def _parallel(planned: PlannedJob, plan: Plan, fsdp: bool):
    degrees = {f"{axis}_degree": getattr(plan, axis) for axis in AXES}
    return replace(planned.parallel, fsdp=fsdp, **degrees)


def _not_chosen(planned: PlannedJob, why: str) -> Chosen:
    """The plan that is taken without a prediction: the job reports what is wrong with it."""
    return Chosen(
        parallel=planned.parallel, experts=planned.model.experts, packed=planned.model.packed, line=why, computing=None
    )
