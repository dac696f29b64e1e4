"""`Runtime`: a group of ranks as one object, with one method per kind of job.

`Runtime` starts the ranks with its first job and keeps them. If a rank dies, the job raises RankDied, and the next job
starts a new group. Every job contains its specs, so a new group needs nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from ..hardware.environment import original, placed
from ..models.registry import require_schedule
from ..specs import (
    AccelerationSpec,
    Calibration,
    DiffusionModelSpec,
    OperatorSpec,
    ParallelSpec,
    ProfileSpec,
    SampleSpec,
    TextEncoderSpec,
    VaeForm,
    VaeSpec,
    VideoSize,
)
from ..specs.acceleration import CALIBRATED
from ..wire.messages import (
    CallSetting,
    Conditioning,
    Decode,
    Describe,
    Encode,
    EncodeTokens,
    EncodeVideo,
    Load,
    Ping,
    Sample,
    SamplerRun,
    Velocity,
)
from ..wire.plans import TEXT_TOKENS, Chosen, PlannedJob
from ..wire.shared_memory import lend
from .arguments import (
    LATENT_AXES,
    check_conditioning,
    check_frames,
    check_history,
    check_image,
    check_kind,
    check_prompt,
    check_tensor,
    check_tokens,
)
from .choosing import asked, with_plan
from .jobs import JobsOfCall
from .kept_ranks import KeptRanks
from .model_calls import NetworkPass, check_call, packed
from .submission import OnPreview, Result

logger = logging.getLogger(__name__)


class Runtime(KeptRanks):
    """Ranks that load, encode, sample and decode. A context manager; thread-safe.

    The ranks belong to the process that created this object; a forked child cannot use it. They end with `stop`, or
    when the object is garbage-collected. Those of a cluster do not end: they wait for the next client, with what they
    have loaded.

    parallel: the number of ranks, and the default plan of `sample`.
    device: "npu", "cuda", "cpu", or "auto" for the first of these that is available. With a cluster: what the machines
        must have; the attribute is "auto" until they have joined, and then what they have.
    environment: environment variables for the ranks only; not with a cluster, whose ranks torchrun starts.
    cluster: machines whose ranks work instead of this host's; see `specs.cluster.read_cluster`. The process listens at
        the cluster's address from the first job until `stop`.
    """

    _calibrated: tuple[tuple, dict[str, Calibration]] | None = None  # of the last run of model calls
    _plan_of_run: tuple[tuple, Chosen] | None = None  # of the same

    def ping(self, tensor: Tensor | None = None, reply: int = 0, frames: tuple[int, ...] | None = None) -> Result:
        """Gets a reply from every rank, to measure the round trip.

        tensor: sent to all ranks. reply: the number of floats to return. frames: the shape [T,H,W,C] of fp32 frames
        that the ranks fill.
        """
        if frames is None:
            return self._do(lambda job: Ping(job=job, tensor=tensor, reply=reply))
        with lend(frames, torch.float32) as (filled, shared):
            self._do(lambda job: Ping(job=job, frames=shared))
        return Result(filled)

    def load(
        self,
        model: DiffusionModelSpec | None = None,
        encoder: TextEncoderSpec | None = None,
        vae: VaeSpec | None = None,
        *,
        parallel: ParallelSpec | None = None,
        **hooks,
    ) -> Result:
        """Loads components before the jobs that use them. parallel: the plan of these jobs; what it leaves open is
        chosen for a video of the model's own size."""
        check_kind("model", model, DiffusionModelSpec, optional=True)
        check_kind("encoder", encoder, TextEncoderSpec, optional=True)
        check_kind("vae", vae, VaeSpec, optional=True)
        check_kind("parallel", parallel, ParallelSpec, optional=True)
        parallel = parallel or self.parallel
        sharded = (model is not None and bool(parallel.fsdp)) or (encoder is not None and self._on_ranks(encoder))
        with self._jobs(sharded, **hooks) as jobs:
            if model is None:
                return jobs(lambda job: Load(job=job, encoder=encoder, vae=vae))

            def run(plan: Chosen) -> Result:
                chosen = {"model": plan.arranged(model), "parallel": plan.parallel, "computing": plan.computing}
                return jobs(lambda job: Load(job=job, encoder=encoder, vae=vae, **chosen))

            return with_plan(jobs, self._choices, PlannedJob(model=model, parallel=parallel), run)

    def encode(
        self, encoder: TextEncoderSpec, text: str, image: Tensor | None = None, image_interleave: int = 2, **hooks
    ) -> Result:
        """Encodes a prompt: the embedding [1, tokens, D], fp32, padded with zeros if the model's training did.

        Further outputs of the model's text encoders are in `tensors`, such as "pooled" [1, D].

        image [H,W,3] or [1,H,W,3]: in 0..1, which the prompt is about, for models whose text encoder sees images; their
            tokens come first in the embedding. image_interleave: one image token in so many is kept.
        """
        check_kind("encoder", encoder, TextEncoderSpec)
        check_prompt(text)
        image = check_image(image, image_interleave)

        def make(job: int) -> Encode:
            return Encode(job=job, encoder=encoder, text=text, image=image, image_interleave=image_interleave)

        return self._do(make, self._on_ranks(encoder), **hooks)

    def encode_tokens(
        self,
        encoder: TextEncoderSpec,
        part: str,
        ids: Tensor,
        length: int,
        embeddings: Mapping[int, Tensor] | None = None,
        **hooks,
    ) -> Result:
        """Encodes tokens as they are, without cleaning or truncation, with one of the text encoders: [1, tokens, D],
        fp32, and further outputs in `tensors`, such as "pooled" [1, D].

        part: of `text_encoders`. ids [S]: int64. length: the number of tokens up to the end of the text; those after it
            are padding. embeddings: [n, D] each, instead of a token, by its place; such as the tokens of an image.
        """
        check_kind("encoder", encoder, TextEncoderSpec)
        embeddings = embeddings or {}
        check_tokens(part, ids, length, embeddings)

        def make(job: int) -> EncodeTokens:
            places, further = tuple(embeddings), list(embeddings.values())
            return EncodeTokens(
                job=job, encoder=encoder, part=part, ids=ids, length=length, places=places, embeddings=further
            )

        return self._do(make, self._on_ranks(encoder), **hooks)

    def text_encoders(self, encoder: TextEncoderSpec, **hooks) -> Result:
        """What text encoders are, without reading their weights: the result's info["encoders"] is {"family": its name,
        "shapes": of all parameters, by part and name, "sentencepiece": whether the tokenizer is such a model, else it
        is a tokenizer.json}. Its tensor is the tokenizer's file, uint8, if core ComfyUI takes it from the encoder."""
        check_kind("encoder", encoder, TextEncoderSpec)
        return self._do(lambda job: Describe(job=job, encoder=encoder), **hooks)

    def sample(
        self,
        model: DiffusionModelSpec,
        spec: SampleSpec,
        latent: Tensor,
        positive: Tensor | Conditioning,
        negative: Tensor | Conditioning | None = None,
        *,
        noise_mask: Tensor | None = None,
        parallel: ParallelSpec | None = None,
        operators: OperatorSpec = OperatorSpec(),
        warm_up: bool = False,
        profile: ProfileSpec | None = None,
        acceleration: AccelerationSpec = AccelerationSpec(),
        history: Mapping[str, Tensor] | None = None,
        on_preview: OnPreview | None = None,
        **hooks,
    ) -> Result:
        """Samples a latent [B,C,T,H,W], fp32 and not normalised.

        latent: the start, not normalised; zeros for a new video (see `VideoSize.latent_shape`).
        positive, negative: embeddings [1, tokens, D], or `Conditioning` for image-to-video models. negative can be None
            if the guidance scale is 1.
        noise_mask: [B or 1, 1, T, H, W], 0 where `latent` is known and kept; TI2V-5B uses it for a given first frame.
        warm_up: runs two discarded steps before the first job of a kind (shapes, plan, operators) after the model is
            loaded, so that compilation at first use is not part of the job's seconds.
        profile: the steps to record; the result's `info["profile"]` is the folder of the recording.
        acceleration: the accelerators to use; the result's `info["acceleration"]` reports what they skipped and saved
            (see `acceleration.tally.Tally.facts`).
        history: the `tensors` of the job's result that ended at spec.start_step with leftover noise. With them, the two
            jobs compute what one would; without them a multistep solver begins again, and so does one for which they do
            not fit (another size, solver or schedule). `info["history"]` is "used" or "missing" for such a solver.

        What `parallel` and the model's spec leave open is chosen: see `plan`. `info["plan"]` has the choice.
        """
        _check_specs(model, spec)
        _check_inputs(latent, positive, negative, noise_mask)
        _check_options(parallel, operators, profile, acceleration)
        history = check_history(history)
        steps = None if spec.total_steps is None else len(spec.computed_steps)
        profile = profile and _within(profile, steps, self.world_size)
        planned = PlannedJob(
            model=model, parallel=parallel or self.parallel, shape=tuple(latent.shape), sample=spec,
            text_tokens=_tokens(_conditioning(positive).text), per_token=noise_mask is not None,
            acceleration=acceleration,
        )  # fmt: skip
        with self._jobs(bool(planned.parallel.fsdp), **hooks, on_preview=on_preview) as jobs:
            calibration = _calibration(jobs, model, acceleration)
            result = with_plan(
                jobs, self._choices, planned,
                lambda plan: jobs(lambda job: Sample(
                    job=job, model=plan.arranged(model), parallel=plan.parallel, computing=plan.computing, spec=spec,
                    latent=latent, positive=_conditioning(positive),
                    negative=None if negative is None else _conditioning(negative), noise_mask=noise_mask,
                    operators=operators, warm_up=warm_up, profile=profile, acceleration=acceleration,
                    calibration=calibration, preview=on_preview is not None, history=history,
                )),
            )  # fmt: skip
        _log_extras(result, profile)
        return result

    def velocity(
        self,
        model: DiffusionModelSpec,
        passes: Sequence[NetworkPass],
        run: SamplerRun,
        step: int,
        *,
        parallel: ParallelSpec | None = None,
        operators: OperatorSpec = OperatorSpec(),
        acceleration: AccelerationSpec = AccelerationSpec(),
        **hooks,
    ) -> Result:
        """The velocities [passes * B, C, T, H, W] of passes through the network, in the dtype of its blocks, for a
        sampler outside of the ranks.

        run, step: which step of which run of the sampler this is. Within a run, inputs that are equal to earlier ones
        are not sent again, and the plan that was chosen for the first call stays.
        """
        check_kind("model", model, DiffusionModelSpec)
        check_call(passes, run, step)
        _check_options(parallel, operators, None, acceleration)
        parallel = parallel or self.parallel
        key = run.number, model, parallel, acceleration
        with self._jobs(bool(parallel.fsdp), **hooks) as jobs:

            def call(plan: Chosen) -> Result:
                self._plan_of_run = key, plan
                setting = CallSetting(
                    model=plan.arranged(model),
                    parallel=plan.parallel,
                    run=run,
                    operators=operators,
                    acceleration=acceleration,
                    calibration=self._calibration_of(run, model, acceleration, jobs),
                    computing=plan.computing,
                )
                with self._held.sent():
                    sent = packed(passes, setting, self._held)
                    return jobs(lambda job: Velocity(job=job, step=step, **vars(sent)))

            if self._plan_of_run is not None and self._plan_of_run[0] == key:
                return call(self._plan_of_run[1])
            return with_plan(jobs, self._choices, _planned_call(model, parallel, passes, run, acceleration), call)

    def plan(
        self,
        model: DiffusionModelSpec,
        spec: SampleSpec = SampleSpec(),
        video: Tensor | VideoSize | None = None,
        *,
        encoder: TextEncoderSpec | None = None,
        vae: VaeSpec | None = None,
        parallel: ParallelSpec | None = None,
        acceleration: AccelerationSpec = AccelerationSpec(),
        text_tokens: int = TEXT_TOKENS,
        **hooks,
    ) -> Chosen:
        """The plan that a sampling job would take, without running it: degrees, FSDP, experts, and the bytes and
        seconds that it is predicted to take.

        video: its size, or its latent [B,C,T,H,W]; None: of the model's own size. encoder, vae: if the whole job is
        asked about. text_tokens: of the prompts. Raises ValueError, with the numbers and the nearest size that fits,
        if nothing fits.
        """
        _check_specs(model, spec)
        check_kind("video", video, Tensor, VideoSize, optional=True)
        check_kind("encoder", encoder, TextEncoderSpec, optional=True)
        check_kind("vae", vae, VaeSpec, optional=True)
        _check_options(parallel, OperatorSpec(), None, acceleration)
        planned = PlannedJob(
            model=model, parallel=parallel or self.parallel, sample=spec, text_tokens=text_tokens, encoder=encoder,
            vae=vae, acceleration=acceleration,
            shape=tuple(video.shape) if isinstance(video, Tensor) else None,
            size=video if isinstance(video, VideoSize) else None,
        )  # fmt: skip
        with self._jobs(**hooks) as jobs:
            return asked(jobs, planned)

    def _calibration_of(
        self, run: SamplerRun, model: DiffusionModelSpec, acceleration: AccelerationSpec, submit: JobsOfCall
    ) -> dict[str, Calibration]:
        """As `_calibration`; read once in a run."""
        key = run.number, model, acceleration
        if self._calibrated is None or self._calibrated[0] != key:
            self._calibrated = key, _calibration(submit, model, acceleration)
        return self._calibrated[1]

    def network(self, model: DiffusionModelSpec, **hooks) -> dict:
        """What a diffusion model is, without reading its weights: {"family": name, "shapes": {name: shape} of its
        tensors as the authors' files have them, "channels": of its latents}."""
        check_kind("model", model, DiffusionModelSpec)
        found = self._do(lambda job: Describe(job=job, network=model), **hooks).info["network"]
        return found | {"shapes": {name: tuple(shape) for name, shape in found["shapes"].items()}}

    def decode(self, vae: VaeSpec, latent: Tensor, **hooks) -> Result:
        """Decodes a latent [B,C,T,H,W] into frames [B*T',H',W',3] in 0..1. The ranks write them to shared memory."""
        check_kind("vae", vae, VaeSpec)
        check_tensor("latent", latent, LATENT_AXES)
        with self._jobs(**hooks) as submit:
            shape = _form(submit, vae).decoded_shape(latent.shape)
            with lend(shape, torch.float32) as (image, shared):
                done = submit(lambda job: Decode(job=job, vae=vae, latent=latent, frames=shared))
        return Result(image, seconds=done.seconds, info=done.info, record=done.record)

    def encode_video(self, vae: VaeSpec, frames: Tensor, **hooks) -> Result:
        """Encodes frames [T,H,W,3] in 0..1, T = 4n+1, into a latent [1,C,T',H',W'], fp32 and not normalised."""
        check_kind("vae", vae, VaeSpec)
        check_frames(frames)
        with self._jobs(**hooks) as submit:
            shape = _form(submit, vae).encoded_shape(frames.shape)
            with lend(shape, torch.float32) as (latent, shared):
                done = submit(lambda job: EncodeVideo(job=job, vae=vae, frames=frames, latent=shared))
        return Result(latent, seconds=done.seconds, info=done.info, record=done.record)

    def vae_form(self, vae: VaeSpec, **hooks) -> VaeForm:
        """The VAE's latent channels and compression factors. Does not read weights."""
        check_kind("vae", vae, VaeSpec)
        with self._jobs(**hooks) as submit:
            return _form(submit, vae)

    def _on_ranks(self, encoder: TextEncoderSpec) -> bool:
        """Whether the text encoder's weights are sharded over all ranks."""
        variables = original(self.device, {**os.environ, **(self._environment or {})})
        return placed(encoder, variables).placement == "ranks"


def _check_specs(model, spec) -> None:
    check_kind("model", model, DiffusionModelSpec)
    check_kind("spec", spec, SampleSpec)
    require_schedule(spec.schedule)


def _check_inputs(latent, positive, negative, noise_mask) -> None:
    check_tensor("latent", latent)
    check_conditioning("positive", positive)
    check_conditioning("negative", negative, optional=True)
    check_tensor("noise_mask", noise_mask, optional=True)


def _check_options(parallel, operators, profile, acceleration) -> None:
    check_kind("parallel", parallel, ParallelSpec, optional=True)
    check_kind("operators", operators, OperatorSpec)
    check_kind("profile", profile, ProfileSpec, optional=True)
    check_kind("acceleration", acceleration, AccelerationSpec)


def _calibration(
    submit: JobsOfCall, model: DiffusionModelSpec, acceleration: AccelerationSpec
) -> dict[str, Calibration]:
    """The calibration of each expert if the step cache needs it. Read once, so that all ranks get the same."""
    cache = acceleration.step_cache
    if cache is None or cache.method not in CALIBRATED:
        return {}
    found = submit(lambda job: Describe(job=job, model=model)).info["calibration"]
    return msgspec.convert(found, dict[str, Calibration])


def _form(submit: JobsOfCall, vae: VaeSpec) -> VaeForm:
    return VaeForm(*submit(lambda job: Describe(job=job, vae=vae)).info["vae"])


def _planned_call(
    model: DiffusionModelSpec, parallel: ParallelSpec, passes: Sequence[NetworkPass], run: SamplerRun,
    acceleration: AccelerationSpec,
) -> PlannedJob:  # fmt: skip
    """All calls of a run, if they are like this one."""
    first = passes[0]
    return PlannedJob(
        model=model, parallel=parallel, shape=tuple(first.latent.shape), branches=min(len(passes), 2),
        sample=SampleSpec(steps=len(run.sigmas) - 1), per_token=first.timesteps.ndim > 1,
        text_tokens=_tokens(first.inputs.get("text")), acceleration=acceleration,
    )  # fmt: skip


def _tokens(text: Tensor | None) -> int:
    """Of an embedding [B, tokens, D]."""
    return text.shape[1] if text is not None and text.ndim == 3 else TEXT_TOKENS


def _conditioning(given: Tensor | Conditioning) -> Conditioning:
    return Conditioning(text=given) if isinstance(given, Tensor) else given


def _within(profile: ProfileSpec, steps: int | None, ranks: int) -> ProfileSpec:
    """`profile`, limited to the job's steps as far as they are known before the model is loaded. Raises ValueError if
    nothing would be recorded."""
    possible = profile.within(steps or profile.last_step, ranks)
    if possible != profile:
        logger.info("The recording ends with step %d, the job's last, not with step %d.", steps, profile.last_step)
    return possible


def _log_extras(result: Result, profile: ProfileSpec | None) -> None:
    """Logs a warm-up and a recording."""
    if "warm up" in result.seconds:
        logger.info("warm-up took %.1f s", result.seconds["warm up"])
    if profile is None:
        return
    steps = f"steps {profile.first_step} to {profile.last_step} on rank {profile.rank}"
    if "profile" in result.info:
        logger.info("Recorded %s: %s", steps, result.info["profile"])
    else:  # torch_npu's profiler reports errors only in the rank's output
        logger.warning("The profiler has not written a recording of %s to %s.", steps, profile.folder)
