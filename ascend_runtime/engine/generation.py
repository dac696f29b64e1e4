"""One generation on this rank: conditioning in, velocities out, before guidance.

`Generation.prepare` makes a job's conditioning and accelerators ready, `velocity` computes passes through the network,
and `finish` frees what these kept. The denoise loop, its warm-up and a calibration all use it.
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
from ..hardware import devices
from ..hardware.environment import overlaps, with_defaults
from ..models.cost import PassSize
from ..models.shared.block_stack import At
from ..models.shared.conditioning import Branch, Given
from ..ops import PlainOperators, operators_for
from ..parallel import cfg
from ..parallel.mesh import mesh_of
from ..parallel.sequence import SequenceLayout as TokenSequence
from ..parallel.sequence import spread
from ..specs import AccelerationSpec, Calibration, OperatorSpec, ParallelSpec, Plan, SampleSpec
from .sampling import Step, schedule_of

BRANCHES = {"cond": "positive", "uncond": "negative"}  # of guidance, and the prompts that they are given


@dataclass(frozen=True)
class Request:
    """What a generation is made of. spec: filled with the model's own values. calibration: what the model's own file
    says of each expert."""

    given: Given
    spec: SampleSpec
    acceleration: AccelerationSpec = AccelerationSpec()
    calibration: Mapping[str, Calibration] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """How the ranks share a generation, and what computes on each. cfg_group: the ranks of the cfg axis, if any."""

    plan: Plan
    operators: PlainOperators
    sequence: TokenSequence
    cfg_group: dist.ProcessGroup | None

    @classmethod
    def arranged(
        cls, plan: Plan, parallel: ParallelSpec, wanted: OperatorSpec, model: DiffusionModel, environ: Mapping[str, str]
    ) -> Ranks:
        """Has the model compute so from now on. environ: the variables of the original systems."""
        device = model.device
        computing = operators_for(device, with_defaults(wanted, environ), model.dtype)
        mesh = mesh_of(device.type, plan)
        sequence = spread(mesh, computing, parallel.ring_exchange, overlaps(parallel, environ))
        for expert in model.experts:
            expert.arrange(computing, sequence)
        return cls(plan, computing, sequence, mesh.group("cfg") if plan.cfg > 1 else None)


class Call(NamedTuple):
    """One pass through the network.

    branch: "cond" or "uncond", by which caches keep apart what they keep. latent [B,C,T,H,W]: normalised, fp32, on the
    CPU. timestep: in 0..1000. context: what the network sees besides the latent.
    """

    branch: str
    latent: Tensor
    timestep: float
    context: Branch


class Generation:
    """See `prepare`. contexts: by branch, what the prompts of the job are to the network."""

    def __init__(
        self, model: DiffusionModel, ranks: Ranks, acceleration: Acceleration, contexts: Mapping[str, Branch]
    ):
        self.acceleration = acceleration
        self.contexts = contexts
        self._model, self._ranks = model, ranks
        self._kept: dict[Branch, object] = {}  # what the network that works now made of each context
        self._low_noise: bool | None = None  # which expert works now

    @classmethod
    def prepare(cls, model: DiffusionModel, request: Request, ranks: Ranks) -> Generation:
        """Raises ValueError for what this model, or these ranks, cannot honour; computes nothing. A rank may fail here
        while others do not."""
        outline = _outline(model, request, ranks)
        acceleration = Acceleration(request.acceleration, outline, ranks.operators)
        return cls(model, ranks, acceleration, _contexts(model, request.given))

    def velocity(self, calls: Sequence[Call], step: Step) -> list[Tensor]:
        """The velocity [B,C,T,H,W] of each call, before guidance, on this rank's device in the blocks' dtype.

        Every rank must ask for the same. Two calls are shared by the two ranks of a cfg axis.
        """
        own = cfg.own_calls(calls, self._ranks.cfg_group)
        inputs = {id(call.latent): call.latent.to(self._model.device, self._model.dtype) for call in own}

        def compute(call: Call) -> Tensor:
            if call is own[-1]:  # this rank's last of the step
                self._model.expect(step.following)
            return self._pass(call, inputs[id(call.latent)], step)

        return cfg.computed(calls, compute, self._ranks.cfg_group)

    def finish(self) -> None:
        """Frees what the passes kept."""
        self._kept.clear()
        for expert in self._model.experts:
            expert.forget()

    def _pass(self, call: Call, latent: Tensor, step: Step) -> Tensor:
        model = self._model
        low_noise = model.is_low_noise(call.timestep)
        if low_noise != self._low_noise:  # another network makes something else of a prompt
            self._kept, self._low_noise = {}, low_noise
        if call.context not in self._kept:
            self._kept[call.context] = call.context.context()
        expert = model.expert_at(call.timestep)
        passing = self.acceleration.passing(At(model.name_at(call.timestep), call.branch, step.number))
        timestep = call.context.timestep(call.timestep)
        return expert(call.context.input(latent), timestep, self._kept[call.context], passing)


def check(model: DiffusionModel, request: Request) -> None:
    """Raises ValueError, on all ranks alike, for what the model cannot honour."""
    spec = request.spec
    model.conditioner.check(request.given)
    if model.guided(spec) and "negative" not in request.given.prompts:
        raise ValueError(
            f"guidance_scale is {spec.guidance_scale}, which needs a negative prompt; "
            "connect one (an empty text will do) or set guidance_scale to 1."
        )


def warm_up_of(model: DiffusionModel, request: Request) -> Request:
    """Two steps of the same kind, one by each expert, whose result is thrown away.

    They leave nothing out but what sparse attention does, in the second: the operators of both begin now.
    """
    rainfusion = request.acceleration.rainfusion
    if rainfusion is not None:
        rainfusion = structs.replace(rainfusion, start=1)
    below_boundary = model.boundary / 2 or 0.5
    spec = structs.replace(request.spec, solver="euler", sigmas=(1.0, below_boundary, 0.0))
    return replace(request, spec=spec, acceleration=AccelerationSpec(rainfusion=rainfusion))


def _contexts(model: DiffusionModel, given: Given) -> dict[str, Branch]:
    return {
        branch: model.conditioner.branch(given.prompts[prompt], given, model.device, model.dtype)
        for branch, prompt in BRANCHES.items()
        if prompt in given.prompts
    }


def _outline(model: DiffusionModel, request: Request, ranks: Ranks) -> Outline:
    """The job as its accelerators see it."""
    family, config, given = model.family, model.high_noise.config, request.given
    grid = family.grid(config, tuple(given.latent.shape[2:]))
    tokens = math.prod(grid)
    texts = {name: prompt.text.shape[1] for name, prompt in given.prompts.items()}
    behind = {name: family.text_in_sequence(config, length) for name, length in texts.items()}
    size = PassSize(
        batch=given.batch,
        tokens=tokens,
        on_rank=ranks.sequence.chunk_of(tokens + max(behind.values())),
        text_tokens=texts["positive"],
        per_token=model.conditioner.per_token(given),
    )
    itemsize = model.dtype.itemsize
    taken = family.bytes_taken(config, size, itemsize)
    guided = model.guided(request.spec)
    return Outline(
        experts=tuple(map(model.name_at, schedule_of(request.spec, family))),
        known=_known(model, request),
        grid=grid,
        own=ranks.sequence.own(tokens, behind["positive"]),  # step caches look at the cond branch only
        branches=2 if guided and ranks.plan.cfg == 1 else 1,
        output=size.batch * size.on_rank * family.width(config) * itemsize,
        room=max(0, devices.room(model.device) - taken),
        ring=ranks.plan.ring,
        work=family.work(config, size),
    )


def _known(model: DiffusionModel, request: Request) -> dict[str, Calibration]:
    """What step caches know of each expert: what the model's own file says, else what was published.

    Raises ValueError where the file is another model's.
    """
    found, experts = request.calibration, tuple(model.adapters)
    if found and set(found) != set(experts):
        raise ValueError(
            f"The calibration next to the model is of {', '.join(found)}, but the model has {', '.join(experts)}. "
            "Calibrate it again: python -m ascend_runtime calibrate MODEL"
        )
    pixels = model.pixels_of(request.given.latent.shape)
    config = model.high_noise.config
    return dict(found) or {
        expert: model.family.calibration(config, model.defaults, pixels, expert) for expert in experts
    }
