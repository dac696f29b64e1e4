"""Computes velocities from conditioning on this rank, before guidance.

`Generation.prepare` prepares a job's conditioning and accelerators, `velocity` runs passes through the network, and
`finish` frees cached tensors. The denoise loop, its warm-up and a calibration all use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch.distributed as dist
from msgspec import structs
from torch import Tensor

from ..acceleration.accelerators import Acceleration, Outline
from ..components import DiffusionModel
from ..errors import coded_error
from ..hardware import devices
from ..hardware.environment import overlaps, with_defaults
from ..models.cost import PassSize
from ..models.registry import require_schedule
from ..models.shared.block_stack import At, Pass, Skipping
from ..models.shared.conditioning import Branch, Given
from ..models.shared.quantized.base import QuantizedLinear
from ..models.shared.quantized.static import use_step
from ..ops import PlainOperators, operators_for
from ..parallel import cfg
from ..parallel.machines import machines
from ..parallel.mesh import mesh_of, this_rank
from ..parallel.sequence import SequenceLayout, spread
from ..planner.holding.dry_job import DryNetwork, DryRank, DryVideo
from ..planner.holding.passes import as_json, taken_by_pass
from ..specs import AccelerationSpec, Calibration, OperatorSpec, ParallelSpec, Plan, SampleSpec
from ..specs.presets import for_family
from .sampling import SolverStep, schedule_of

BRANCHES = {"cond": "positive", "uncond": "negative"}  # guidance branch -> its prompt
MOST_CONTEXTS = 4  # embedded ones that are kept, each with keys and values of all blocks


@dataclass(frozen=True)
class Request:
    """The inputs of a generation. spec: without None, as the model's own values are filled in. calibration: of each
    expert, read from the model's calibration file. history: of the job whose steps this one follows."""

    given: Given
    spec: SampleSpec
    acceleration: AccelerationSpec = AccelerationSpec()
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    history: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """How the ranks share a generation, and the operators of each. cfg_group: the process group of the cfg axis, or
    None. ring_exchange, overlap: as in ParallelSpec."""

    plan: Plan
    operators: PlainOperators
    sequence: SequenceLayout
    cfg_group: dist.ProcessGroup | None
    ring_exchange: str = "rotate"
    overlap: bool = False

    @classmethod
    def arranged(
        cls, plan: Plan, parallel: ParallelSpec, wanted: OperatorSpec, model: DiffusionModel, environ: Mapping[str, str]
    ) -> Ranks:
        """Sets the model up for the plan and operators. environ: the original systems' environment variables."""
        computing = operators_for(model.device, with_defaults(wanted, environ), model.dtype)
        ranks = cls.spread(plan, parallel, computing, model, environ)
        ranks.arrange(model)
        return ranks

    @classmethod
    def spread(
        cls, plan: Plan, parallel: ParallelSpec, computing: PlainOperators, model: DiffusionModel,
        environ: Mapping[str, str],
    ) -> Ranks:  # fmt: skip
        """The ranks of a plan. Collective the first time, and sets nothing up."""
        mesh = mesh_of(model.device.type, plan)
        exchange, overlap = parallel.ring_exchange, overlaps(parallel, environ)
        sequence = spread(mesh, computing, exchange, overlap)
        return cls(plan, computing, sequence, mesh.group("cfg"), exchange, overlap)

    def dry(self, kind: str) -> DryRank:
        """This rank as the planner sees it. kind: of its device."""
        return DryRank(kind, self.plan, this_rank(), self.ring_exchange, self.overlap)

    def arrange(self, model: DiffusionModel) -> None:
        """Sets the model up for this plan and these operators."""
        for expert in model.experts:
            expert.arrange(self.operators, self.sequence)


def unguided(plan: Plan, acceleration: AccelerationSpec) -> Plan:
    """The plan for one pass at a time. Ulysses does not cross machines for it, unless sparse attention needs all tokens
    of a head on one rank."""
    return plan.unguided(() if acceleration.rainfusion else machines().hosts)


class NetworkCall(NamedTuple):
    """The inputs of one pass through the network.

    branch: "cond" or "uncond", part of the caches' keys. latent [B,C,T,H,W]: normalised, on the CPU.
    timestep: in 0..1000. context: the conditioning besides the latent.
    timesteps [B] or [B,T]: if videos or frames have timesteps of their own; `timestep` is the highest then.
    skipped: the blocks that are left out.
    """

    branch: str
    latent: Tensor
    timestep: float
    context: Branch
    timesteps: Tensor | None = None
    skipped: tuple[int, ...] = ()


class Course(NamedTuple):
    """What is known of all passes of a generation before the first one.

    shape: of the latent [B,C,T,H,W]. size: [T,H,W] of all that the tokens of a video come from.
    texts: the number of a text's tokens, of each branch. per_token: whether each token has its own timestep.
    timesteps: of each step, in 0..1000. calibration: of each expert, from the model's calibration file.
    """

    shape: tuple[int, ...]
    size: tuple[int, int, int]
    texts: Mapping[str, int]
    per_token: bool
    timesteps: Sequence[float]
    acceleration: AccelerationSpec
    calibration: Mapping[str, Calibration]


class Generation:
    """One generation; made by `prepare` or `along`. contexts: branch -> the conditioning of its prompt, if each branch
    has one only."""

    def __init__(
        self, model: DiffusionModel, ranks: Ranks, acceleration: Acceleration, contexts: Mapping[str, Branch]
    ):
        self.acceleration = acceleration
        self.contexts = contexts
        self._model, self._ranks = model, ranks
        self._kept: dict[Branch, object] = {}  # each context as embedded by the current expert; the last used is last
        self._low_noise: bool | None = None  # whether the current expert is the low-noise one

    @classmethod
    def prepare(cls, model: DiffusionModel, request: Request, ranks: Ranks) -> Generation:
        """Prepares conditioning and accelerators, without running the network. Raises ValueError for a request that
        this model or these ranks do not support, possibly on some ranks only."""
        return cls.along(model, _course(model, request), ranks, _contexts(model, request.given))

    @classmethod
    def along(cls, model: DiffusionModel, course: Course, ranks: Ranks, contexts: Mapping[str, Branch]) -> Generation:
        """Prepares accelerators for passes whose conditioning comes with each call."""
        spec = for_family(course.acceleration, model.family.presets)
        return cls(model, ranks, Acceleration(spec, _outline(model, course, ranks), ranks.operators), contexts)

    def on(self, ranks: Ranks) -> None:
        """Goes on with another plan. Not possible while an accelerator keeps tensors."""
        if ranks is not self._ranks:
            self._ranks = ranks
            ranks.arrange(self._model)

    def velocity(
        self, calls: Sequence[NetworkCall], step: SolverStep, instead: Mapping[str, Pass] = {}
    ) -> list[Tensor]:
        """The velocity [B,C,T,H,W] of each call, before guidance, on this rank's device in the blocks' dtype.

        All ranks must pass the same calls. The two ranks of a cfg axis compute one of two calls each.
        instead: branch -> a pass in the place of the accelerators'.
        """
        own = cfg.own_calls(calls, self._ranks.cfg_group)
        device, dtype = self._model.device, self._model.dtype
        inputs = {id(call.latent): devices.sent(call.latent.to(dtype), device) for call in own}

        def compute(call: NetworkCall) -> Tensor:
            if call is own[-1]:  # this rank's last call in the step
                self._model.expect(step.following)
            return self._pass(call, inputs[id(call.latent)], step, instead.get(call.branch))

        return cfg.computed(calls, compute, self._ranks.cfg_group)

    def finish(self) -> None:
        """Frees the tensors that the passes cached."""
        self._kept.clear()
        for expert in self._model.experts:
            expert.forget()

    def _pass(self, call: NetworkCall, latent: Tensor, step: SolverStep, passing: Pass | None) -> Tensor:
        model = self._model
        low_noise = model.is_low_noise(call.timestep)
        if low_noise != self._low_noise:  # each expert embeds prompts with its own weights
            self._kept, self._low_noise = {}, low_noise
        context = self._embedded(call.context)
        expert = model.expert_at(call.timestep)
        if model.defaults.static_steps:
            use_step(expert, model.defaults.static_step(step.number))
        if passing is None:
            passing = self.acceleration.passing(At(model.name_at(call.timestep), call.branch, step.number))
        if call.skipped:
            passing = Skipping(passing, call.skipped)
        own = call.context
        timestep = own.timestep(call.timestep) if call.timesteps is None else own.timesteps(call.timesteps)
        return own.output(expert(own.input(latent), timestep, context, passing))

    def _embedded(self, branch: Branch) -> object:
        """The context of a branch. Those that were not used for longest are made again if there are many."""
        self._kept[branch] = context = self._kept.pop(branch, None) or branch.context()
        while len(self._kept) > MOST_CONTEXTS:
            del self._kept[next(iter(self._kept))]
        return context


def check_request(model: DiffusionModel, request: Request) -> None:
    """Raises ValueError, on all ranks alike, for a request that the model does not support."""
    spec = request.spec
    require_schedule(spec.schedule)
    model.conditioner.check(request.given)
    if model.guided(spec) and "negative" not in request.given.prompts:
        raise ValueError(
            f"guidance_scale is {spec.guidance_scale}, which needs a negative prompt; "
            "connect one (an empty text will do) or set guidance_scale to 1."
        )
    if spec.image_start and model.conditioner.first_frame(request.given) is None:
        raise ValueError(
            "image_start is True, but this job has no image that the video begins with, or the model has no such start "
            "(models that replace or read a first frame have one). Leave it at False, or give the image."
        )


def warm_up_of(model: DiffusionModel, request: Request) -> Request:
    """The request of a warm-up: two steps, one per expert, whose result is discarded.

    Without caches. Sparse attention begins with the second step, so that both kinds of attention warm up.
    """
    rainfusion = request.acceleration.rainfusion
    if rainfusion is not None:
        rainfusion = structs.replace(rainfusion, start=1)
    below_boundary = model.boundary / 2 or 0.5
    whole = {"start_step": 0, "end_step": None, "add_noise": True}
    spec = structs.replace(request.spec, solver="euler", sigmas=(1.0, below_boundary, 0.0), **whole)
    return replace(request, spec=spec, acceleration=AccelerationSpec(rainfusion=rainfusion), history={})


def _contexts(model: DiffusionModel, given: Given) -> dict[str, Branch]:
    return {
        branch: model.conditioner.branch(given.prompts[prompt], given, model.device, model.dtype)
        for branch, prompt in BRANCHES.items()
        if prompt in given.prompts
    }


def _course(model: DiffusionModel, request: Request) -> Course:
    given, spec = request.given, request.spec
    texts = {branch: given.prompts[name].text.shape[1] for branch, name in BRANCHES.items() if name in given.prompts}
    guided = model.guided(spec)
    return Course(
        shape=tuple(given.latent.shape),
        size=tuple(given.latent.shape[2:]),
        texts={branch: tokens for branch, tokens in texts.items() if guided or branch == "cond"},
        per_token=model.conditioner.per_token(given),
        timesteps=schedule_of(spec, model.family),
        acceleration=request.acceleration,
        calibration=request.calibration,
    )


def _outline(model: DiffusionModel, course: Course, ranks: Ranks) -> Outline:
    """The properties of the generation that its accelerators need."""
    family, config = model.family, model.high_noise.config
    grid = family.grid(config, course.size)
    tokens = math.prod(grid)
    behind = {branch: family.text_in_sequence(config, length) for branch, length in course.texts.items()}
    first = "cond" if "cond" in course.texts else next(iter(course.texts))
    size = PassSize(
        batch=course.shape[0],
        tokens=tokens,
        on_rank=ranks.sequence.chunk_of(tokens + max(behind.values())),
        text_tokens=course.texts[first],
        per_token=course.per_token,
    )
    itemsize = model.dtype.itemsize
    return Outline(
        experts=tuple(map(model.name_at, course.timesteps)),
        known=_known(model, course),
        grid=grid,
        own=ranks.sequence.own(tokens, behind[first]),  # step caches look at the cond branch only
        branches=len(course.texts) if ranks.plan.cfg == 1 else 1,
        output=size.batch * size.on_rank * family.width(config) * itemsize,
        room=_room_for_caches(model, course, ranks),
        ring=ranks.plan.ring,
        work=family.work(config, size),
    )


def _room_for_caches(model: DiffusionModel, course: Course, ranks: Ranks) -> int:
    """The bytes that are free during a pass; asked for by caches only."""
    if course.acceleration.cache is None:
        return 0
    config, batch, channels = model.high_noise.config, *course.shape[:2]
    layers = model.high_noise.named_modules()
    in_8_bits = frozenset(name for name, layer in layers if isinstance(layer, QuantizedLinear))
    dtype = str(model.dtype).removeprefix("torch.")
    network = DryNetwork(model.family, as_json(config), dtype, in_8_bits, ranks.plan.tp)
    branches = len(course.texts) if ranks.plan.cfg == 1 else 1
    video = DryVideo((batch, channels, *course.size), max(course.texts.values()), course.per_token, branches)
    return max(0, devices.room(model.device) - taken_by_pass(network, video, ranks.dry(model.device.type)))


def _known(model: DiffusionModel, course: Course) -> dict[str, Calibration]:
    """The calibration of each expert: the model's file, else published values.

    Raises ValueError if the file does not match the model's experts.
    """
    found, experts = course.calibration, tuple(model.adapters)
    if found and set(found) != set(experts):
        raise coded_error(
            "AV-1416",
            f"The calibration next to the model is for {', '.join(found)}, but the model has {', '.join(experts)}. "
            "Calibrate it again: python -m ascend_runtime calibrate MODEL",
        )
    pixels = model.pixels_of(course.shape)
    config = model.high_noise.config
    if model.defaults.distilled:  # published values are of the models that were not
        return dict(found) or dict.fromkeys(experts, Calibration())
    return dict(found) or {
        expert: model.family.calibration(config, model.defaults, pixels, expert) for expert in experts
    }
