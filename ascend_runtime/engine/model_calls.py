"""Passes through a network for a sampler outside of the ranks; one job for all passes of a call.

What the calls of a run share stays on each rank between them: the arranged model, its accelerators, the conditioning.
All ranks get the same messages, so they decide alike what is new; after a failure the client makes them begin again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..components import DiffusionModel
from ..hardware.environment import with_defaults
from ..models.shared.conditioning import Branch, Inputs
from ..ops import operators_for
from ..ops.finite import is_finite
from ..parallel.mesh import all_reduce_max
from ..specs import AccelerationSpec, Plan
from ..wire.messages import CallSetting, ModelPass, Velocity
from .explaining import Generated, Sources
from .generation import Course, Generation, NetworkCall, Ranks, unguided
from .guard.diagnosis import Diagnosis, Evaluation
from .sampling import TRAIN_TIMESTEPS, SolverStep

MOST_BRANCHES = 32  # whose conditioning stays on the device
DECIDED_ON_COND = ("fbcache", "teacache")  # step caches that look at the cond branch
ONCE = (
    "An accelerator needs each step once, with one evaluation of each prompt. Choose a sampler that evaluates once, "
    "such as euler, dpmpp_2m, uni_pc, res_multistep or lcm (heun, heunpp2, dpm_2, dpm_fast, dpm_adaptive, "
    "dpmpp_2s_ancestral, dpmpp_sde, seeds_2 and restart evaluate several times), and take out areas, context windows "
    "and guiders with more than two prompts; or take out the accelerator."
)

LoadModel = Callable[[CallSetting], tuple[DiffusionModel, Plan]]
HeldByNumber = dict[int, Tensor]


class ModelCalls:
    """The tensors that this rank holds by number, and the runs that go on.

    environ: the original systems' environment variables.
    """

    def __init__(self, environ: Mapping[str, str]):
        self._environ = environ
        self._held: HeldByNumber = {}
        self._setting: CallSetting | None = None  # of the last call
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()  # each belongs to its model, and is freed with it
        self._last: weakref.ref[Run] | None = None

    @property
    def going_on(self) -> bool:
        """Whether the run of the last call has further steps."""
        last = self._last and self._last()
        return last is not None and not last.finished

    def end(self) -> None:
        """Ends all runs. The tensors stay valid."""
        for run in list(self._runs):
            run.end()
        self._runs.clear()
        self._last = None

    def forget(self) -> None:
        """Ends all runs, and frees the tensors."""
        self.end()
        self._held.clear()
        self._setting = None

    def run_of(self, job, load: LoadModel) -> tuple[Run, bool]:
        """(the run that the job's call belongs to, whether it is new). Keeps and drops tensors as the call says.

        load: loads the model of a setting, and resolves its plan; called, on all ranks, unless the call before was of
        the same run.
        """
        self._take(job.message)
        setting = self._setting
        last = self._last and self._last()
        if last is not None and last.setting is setting:
            return last, False
        del last  # it refers to a model that may have to leave
        self._end_finished()  # before another model needs the memory
        model, plan = load(setting)
        run = model.standing
        new = bool(all_reduce_max(run is None or run.setting != setting))  # a rank may have read the model again
        if new:
            if run is not None:
                run.end()
            with job.together():
                run = model.standing = Run(setting, model, plan, self._environ, self._held)
            self._runs.add(run)
        run.setting = setting  # an equal one
        self._last = weakref.ref(run)
        return run, new

    def _end_finished(self) -> None:
        for run in [run for run in self._runs if run.finished]:
            run.end()
            self._runs.discard(run)

    def _take(self, message: Velocity) -> None:
        if message.fresh:
            self.forget()
        for number in message.drop:
            self._held.pop(number, None)
        for run in self._runs:
            run.drop(message.drop)
        self._held.update(message.held)
        self._setting = message.setting or self._setting
        assert self._setting is not None, "the first call has no setting"


class Run:
    """A run of a sampler on one model. held: the tensors that this rank holds."""

    def __init__(
        self, setting: CallSetting, model: DiffusionModel, plan: Plan, environ: Mapping[str, str], held: HeldByNumber
    ):
        self.setting = setting
        self.finished = False  # whether the last step has been computed
        self.sources = Sources()  # of its model
        self._calls_made = 0
        self._shape: tuple[int, ...] = ()  # of the first latent
        self._plan = plan  # of two passes at a time
        self.model, self._environ, self._held = model, environ, held
        self._sigmas = setting.run.sigmas
        self._accelerated = None if setting.acceleration == AccelerationSpec() else Accelerated(setting.acceleration)
        self._operators = operators_for(model.device, with_defaults(setting.operators, environ), model.dtype)
        self._ranks: dict[Plan, Ranks] = {}
        self._branches: dict[tuple, Branch] = {}  # the last used is last
        self._generation: Generation | None = None

    @property
    def plan(self) -> Plan:
        """Of the first passes."""
        return next(iter(self._ranks))

    @property
    def warnings(self) -> list[str]:
        return self.model.warnings

    @property
    def is_at_an_end(self) -> bool:
        """Whether the last call was the first of the run, or of its last step."""
        return self.finished or self._calls_made == 1

    @property
    def generated(self) -> Generated:
        """What has been generated so far."""
        return Generated(self._shape, self.plan, self._generation.acceleration)

    def end(self) -> None:
        if self._generation is not None:
            self._generation.finish()
        self.model.standing = None

    def drop(self, numbers: Sequence[int]) -> None:
        """Frees what was made of tensors that are no longer held."""
        gone = {("input", number) for number in numbers}
        for key in [key for key in self._branches if gone.intersection(key)]:
            del self._branches[key]

    def velocities(self, job) -> Tensor:
        """The velocities [passes * B,C,T,H,W] of the job's passes, on this rank's device in the blocks' dtype. Raises
        ValueError, with the reason as far as this rank sees it, if they are not finite."""
        message = job.message
        self._check(message)
        calls = self._calls(job)
        rounds = self._rounds(message.passes)
        generation = self._generation or self._begun(job, calls, rounds[0])
        made: dict[int, Tensor] = {}
        for number, numbers in enumerate(rounds):
            if number:
                job.check_together()
            generation.on(self._ranks_for(len(numbers)))
            step = self._step(message, calls, last=number + 1 == len(rounds))
            made |= zip(numbers, generation.velocity([calls[one] for one in numbers], step))
        self.finished = message.step >= len(self._sigmas) - 2
        self._calls_made += 1
        velocities = torch.cat([made[number] for number in range(len(calls))])
        if not is_finite(velocities):
            evaluation = Evaluation(calls, step, [made[number] for number in range(len(calls))])
            raise Diagnosis(generation, self.model, evaluation, together=False).error(len(self._sigmas) - 1)
        return velocities

    def facts(self, step: int, seconds: float) -> dict[str, object]:
        """What accelerators have saved in the run so far: see `Acceleration.facts`. step, seconds: of the last call."""
        self._generation.acceleration.tally.took(step, seconds)
        return self._generation.acceleration.facts()

    def _check(self, message: Velocity) -> None:
        blocks = len(self.model.high_noise.blocks)
        for number in {number for one in message.passes for number in one.skipped}:
            if not 0 <= number < blocks:
                raise ValueError(f"Block {number} is to be skipped; this model has the blocks 0 to {blocks - 1}.")
        if self._accelerated is not None:
            self._accelerated.check(message)

    def _step(self, message: Velocity, calls: list[NetworkCall], last: bool) -> SolverStep:
        """Another expert is expected after the last pass of the step."""
        following = self._sigmas[message.step + 1] * TRAIN_TIMESTEPS if last else calls[-1].timestep
        ends = last and message.step + 2 >= len(self._sigmas)
        return SolverStep(message.step, None if ends else following)

    def _rounds(self, passes: Sequence[ModelPass]) -> list[list[int]]:
        """The numbers of passes that are computed together, at most two: cond first, as step caches decide on it.

        Ranks that compute different passes at the same time must run the same blocks, as FSDP gathers their weights.
        """
        rounds: list[list[int]] = []
        for number in sorted(range(len(passes)), key=lambda number: passes[number].branch != "cond"):
            before = rounds[-1] if rounds else []
            if len(before) == 1 and (self._plan.cfg == 1 or passes[before[0]].skipped == passes[number].skipped):
                before.append(number)
            else:
                rounds.append([number])
        return rounds

    def _ranks_for(self, passes: int) -> Ranks:
        """How the ranks share one pass, or two. All ranks must call it."""
        if self._accelerated and self._ranks:  # what caches keep fits one plan only
            return next(iter(self._ranks.values()))
        plan = self._plan if passes == 2 else unguided(self._plan, self.setting.acceleration)
        if plan not in self._ranks:
            self._ranks[plan] = Ranks.spread(plan, self.setting.parallel, self._operators, self.model, self._environ)
        return self._ranks[plan]

    def _calls(self, job) -> list[NetworkCall]:
        message = job.message
        keys = [self._key(one, message.latents[one.latent]) for one in message.passes]
        if any(key not in self._branches for key in keys):
            with job.together():  # a rank's memory may be short
                for key, one in zip(keys, message.passes):
                    if key not in self._branches:
                        self._branches[key] = self._branch(one, message.latents[one.latent])
        for key in keys:
            self._branches[key] = self._branches.pop(key)
        calls = [
            NetworkCall(one.branch, message.latents[one.latent], float(one.timesteps.max()), self._branches[key],
                        one.timesteps, one.skipped)
            for key, one in zip(keys, message.passes)
        ]  # fmt: skip
        while len(self._branches) > max(MOST_BRANCHES, len(keys)):
            del self._branches[next(iter(self._branches))]
        return calls

    @staticmethod
    def _key(one: ModelPass, latent: Tensor) -> tuple:
        """What the conditioning of a pass depends on."""
        return (one.branch, latent.shape, *one.inputs, *(("input", number) for number in one.inputs.values()))

    def _branch(self, one: ModelPass, latent: Tensor) -> Branch:
        inputs = self._inputs(one, latent)
        self.model.conditioner.check_inputs(inputs)
        return self.model.conditioner.outer_branch(inputs, self.model.device, self.model.dtype)

    def _inputs(self, one: ModelPass, latent: Tensor) -> Inputs:
        missing = sorted(name for name, number in one.inputs.items() if number not in self._held)
        assert not missing, missing  # the client sends what it has not sent yet
        return Inputs(tuple(latent.shape), {name: self._held[number] for name, number in one.inputs.items()})

    def _begun(self, job, calls: list[NetworkCall], first: list[int]) -> Generation:
        message, own = job.message, calls[first[0]]
        self._shape = tuple(own.latent.shape)
        inputs = self._inputs(message.passes[first[0]], own.latent)
        course = Course(
            shape=self._shape,
            size=self.model.conditioner.outer_size(inputs),
            texts={calls[number].branch: calls[number].context.text.shape[1] for number in reversed(first)},
            per_token=own.timesteps.ndim > 1,
            timesteps=[sigma * TRAIN_TIMESTEPS for sigma in self._sigmas[:-1]],
            acceleration=self.setting.acceleration,
            calibration=self.setting.calibration,
        )
        ranks = self._ranks_for(len(first))
        with job.together():
            ranks.arrange(self.model)
            self._generation = Generation.along(self.model, course, ranks, {})
        return self._generation


class Accelerated:
    """Checks that the calls of a run are those that its accelerator needs: the same ones in each step, each branch
    once."""

    def __init__(self, spec: AccelerationSpec):
        self._on_cond = spec.step_cache is not None and spec.step_cache.method in DECIDED_ON_COND
        self._shape: tuple[int, ...] | None = None  # of the run's latents
        self._first, self._step = -1, -1
        self._branches: set[str] = set()  # of this step so far
        self._calls: set[tuple[str, ...]] = set()  # the branches of each call of the first step

    def check(self, message: Velocity) -> None:
        """Raises ValueError for a call that the accelerator cannot reuse anything in, or reuses what does not fit."""
        branches, shape = tuple(one.branch for one in message.passes), tuple(message.latents[0].shape)
        if self._shape is None:
            self._first, self._shape = message.step, shape
        if message.step < self._step:
            raise ValueError(f"Step {message.step} follows step {self._step}. {ONCE}")
        if message.step > self._step:
            self._step, self._branches = message.step, set()
        if message.step == self._first:
            self._calls.add(branches)
        if shape != self._shape or self._branches.intersection(branches) or len(set(branches)) < len(branches):
            raise ValueError(f"Step {message.step} evaluates a prompt several times. {ONCE}")
        self._branches.update(branches)
        if branches not in self._calls or self._on_cond and "cond" not in self._branches:
            raise ValueError(
                f"Step {message.step} evaluates {' and '.join(branches)}, which step {self._first} does otherwise. "
                "An accelerator needs the same prompts in each step, the positive one first. Take it out, or what "
                "changes the guidance on the way."
            )
        if any(one.skipped for one in message.passes):
            raise ValueError(
                "Skip layer guidance leaves blocks out, whose results an accelerator would reuse. Take one of them out."
            )
