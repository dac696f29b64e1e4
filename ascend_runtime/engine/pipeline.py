"""What a rank does with a job: load, encode, sample, decode. Knows nothing of sockets."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from contextlib import nullcontext

import torch
import torch.distributed as dist
from msgspec.structs import astuple, replace
from torch import Tensor

from ..acceleration.accelerators import Acceleration, Outline
from ..checkpoints.calibration_file import read_calibration
from ..components import Components, DiffusionModel, TextEncoder
from ..components.text import Encoded, KnownPrompts, clean, cut_of, embedding_of, encode_text
from ..hardware import devices
from ..hardware.environment import original, overlaps, placed, with_defaults
from ..models.block_stack import At
from ..models.wan.calibrations import known_of
from ..models.wan.cost import taken_by, work_of
from ..ops import operators_for
from ..ops.precision import check_finite
from ..parallel.cfg import guided
from ..parallel.fsdp import Sharding, sharding_of
from ..parallel.mesh import highest, mesh_of
from ..parallel.sequence import spread
from ..recognition.layout import vae_form
from ..specs import AccelerationSpec, ParallelSpec, Plan, SampleSpec, TextEncoderSpec
from ..wire.messages import Done, Sample
from ..wire.shared_memory import borrowed
from . import conditioning
from .profiling import Recorder
from .sampling import Step, denoise, schedule_of
from .video import decode_video, encode_video


class Pipeline:
    """The work of one rank; every method takes a job (see job.py) and returns its `Done`.

    Encoding a text is rank 0's where the encoder's placement is not ranks; the others answer at once and leave it their
    cores. All else is the work of all.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = dist.get_rank()
        self.components = Components(device)
        self._asked = original(device.type, os.environ)
        self.prompts = KnownPrompts()  # on rank 0; outlives the encoder, as it is small

    def ping(self, job) -> Done:
        """Returns `reply` floats from rank 0; fills this rank's share of the frames, if some are lent."""
        message = job.message
        if message.frames is not None:
            with borrowed(message.frames) as frames:
                frames.tensor_split(dist.get_world_size())[self.rank].fill_(1.0)
        reply = torch.ones(message.reply) if message.reply and self.rank == 0 else None
        return _done(job, tensor=reply)

    def load(self, job) -> Done:
        message, warnings = job.message, []
        encoder, text_sharding = (None, None) if message.encoder is None else self._placed(message.encoder)
        if message.model is not None:
            sharding = self._sharding(self._plan(message.parallel), message.parallel)
        with job.together():  # one rank may still read for minutes when another has found something wrong
            if message.model is not None:
                warnings = self._component(message.model, job, sharding).warnings
            if encoder is not None:
                self._text_encoder(encoder, job, text_sharding)
            if message.vae is not None:
                self._component(message.vae, job)
        return _done(job, info=_said(warnings))

    def encode(self, job) -> Done:
        """A prompt that rank 0 knows takes no encoder on any rank: none is loaded for it, and none is dropped."""
        spec, sharding = self._placed(job.message.encoder)
        text = clean(job.message.text)
        with job.together():
            key = (spec, self.components.state(spec), text) if self.rank == 0 else None
        encoded = self.prompts.get(key)
        known = not highest(self.rank == 0 and encoded is None)
        if not known:
            encoded = self._encoded(job, spec, sharding, text)
        if self.rank != 0:
            return _done(job)
        self.prompts.keep(key, encoded)
        info = _said(encoded.warnings) | ({"prompt": "known"} if known else {})
        return _done(job, tensor=embedding_of(encoded.hidden), info=info)

    def _encoded(self, job, spec: TextEncoderSpec, sharding: Sharding, text: str) -> Encoded | None:
        """What the encoder makes of a clean prompt; None where that is another rank's work."""
        on_ranks = spec.placement == "ranks"
        with job.together() if on_ranks else nullcontext():
            encoder = self._text_encoder(spec, job, sharding)
        if encoder is None:
            return None

        def on_block(index: int, total: int) -> None:
            if on_ranks:
                job.check_together()
            else:
                job.check()
            job.progress("encode", index + 1, total)

        with job.stage("encode"), nullcontext() if on_ranks else devices.all_cores():
            hidden = encode_text(encoder.model, encoder.tokenizer, text, on_block)
        return Encoded(hidden, cut_of(encoder.tokenizer, text))

    def sample(self, job) -> Done:
        message = job.message
        plan = self._plan(message.parallel)
        sharding = self._sharding(plan, message.parallel)
        with job.together():
            recorder = Recorder(message.profile, self.device, self.rank)
            model = self._component(message.model, job, sharding)
            # A latent's elements stand for 8 x 8 pixels in every model that asks for their number.
            spec = model.defaults.fill(message.spec, pixels=64 * math.prod(message.latent.shape[3:]))
            recorder.end_with(spec.total_steps)
        _require_agreement(spec, model)
        plan = plan if model.guided(spec) else plan.unguided()
        conditioning.check(message, spec, model)
        operators = operators_for(self.device, with_defaults(message.operators, self._asked), model.dtype)
        mesh = mesh_of(self.device.type, plan)
        sequence = spread(mesh, operators, message.parallel.ring_exchange, overlaps(message.parallel, self._asked))
        for expert in model.experts:
            expert.arrange(operators, sequence)
        cfg_group = mesh.group("cfg") if plan.cfg > 1 else None
        with job.together():
            outline = self._outline(message, model, spec, plan, sequence)
            acceleration = Acceleration(message.acceleration, outline, operators)
        if message.warm_up:
            self._warm_up(job, model, spec, plan, outline, operators, cfg_group)
        with job.stage("denoise"):
            latent = self._denoise(job, "denoise", model, spec, cfg_group, acceleration, around_step=recorder.step)
        check_finite(latent, "The denoised latent")
        info = plan.info | _settings(spec, model) | recorder.info | acceleration.facts() | _said(model.warnings)
        return _done(job, tensor=latent if self.rank == 0 else None, info=info)

    def decode(self, job) -> Done:
        message = job.message
        with borrowed(message.frames) as frames:
            vae = self._vae(job)
            with job.stage("decode"):
                facts = decode_video(vae, message.latent, frames, _each_frame(job, "decode"))
        return _done(job, info=facts)

    def encode_video(self, job) -> Done:
        message = job.message
        with borrowed(message.latent) as latent:
            vae = self._vae(job)
            with job.stage("encode"):
                facts = encode_video(vae, message.frames, latent, _each_frame(job, "encode"))
        return _done(job, info=facts)

    def describe(self, job) -> Done:
        """What files say that a client has to know before it asks for more; rank 0 reads them, as a client that does
        could be kept waiting by a disk for as long as that likes."""
        message, info = job.message, {}
        if self.rank == 0 and message.vae is not None:
            info["vae"] = dataclasses.astuple(vae_form(message.vae.path))
        if self.rank == 0 and message.model is not None:
            info["calibration"] = read_calibration(message.model.path)
        return _done(job, info=info)

    def free(self, job) -> Done:
        self.components.free()
        return _done(job)

    def _plan(self, parallel: ParallelSpec) -> Plan:
        return parallel.resolve(dist.get_world_size(), guided=True)

    def _sharding(self, plan: Plan, parallel: ParallelSpec) -> Sharding:
        """How a model's weights are spread; every rank must ask, before it does what may fail on it alone."""
        return sharding_of(self.device.type, dist.get_world_size(), plan.tp, parallel.fsdp)

    def _placed(self, spec: TextEncoderSpec) -> tuple[TextEncoderSpec, Sharding]:
        """The text encoder with its placement chosen, and its sharding; every rank must ask, as for `_sharding`."""
        spec = placed(spec, self._asked)
        return spec, sharding_of(self.device.type, dist.get_world_size(), tp=1, fsdp=spec.placement == "ranks")

    def _text_encoder(self, spec: TextEncoderSpec, job, sharding: Sharding) -> TextEncoder | None:
        """None where it is rank 0's alone; this rank's share of one on the ranks is freed then."""
        if spec.placement == "ranks" or self.rank == 0:
            return self._component(spec, job, sharding)
        self.components.drop(TextEncoderSpec)
        return None

    def _vae(self, job):
        with job.together():
            return self._component(job.message.vae, job)

    def _component(self, spec, job, sharding: Sharding = Sharding()):
        def on_bytes(done: int, total: int) -> None:
            job.check()
            job.progress("load", done, total)

        with job.stage("load"):
            return self.components.get(spec, on_bytes, sharding)

    def _warm_up(
        self, job, model: DiffusionModel, spec: SampleSpec, plan: Plan, outline: Outline, operators, cfg_group
    ) -> None:
        """Two steps that are thrown away, one by each expert, if this model has not yet made such for such a job.

        They leave nothing out but what sparse attention does, in the second: the operators of both begin now.
        """
        message = job.message
        rainfusion = message.acceleration.rainfusion and replace(message.acceleration.rainfusion, start=1)
        given = [tensor for one in (message.positive, message.negative) if one is not None for tensor in astuple(one)]
        branches = (spec.guidance_scale != 1.0, spec.low_noise_guidance != 1.0)
        shapes = tuple(t is not None and t.shape for t in (message.latent, message.noise_mask, *given))
        kind = (plan, message.parallel, message.operators, rainfusion, shapes, branches)
        if not highest(kind not in model.warmed):  # ranks that failed apart may remember different kinds
            return
        below_boundary = model.boundary / 2 or 0.5
        with job.stage("warm up"):
            spec = replace(spec, solver="euler", sigmas=(1.0, below_boundary, 0.0))
            outline = dataclasses.replace(outline, experts=tuple(map(model.name_at, schedule_of(spec))))
            acceleration = Acceleration(AccelerationSpec(rainfusion=rainfusion), outline, operators)
            self._denoise(job, "warm up", model, spec, cfg_group, acceleration)
        model.warmed.add(kind)

    def _outline(self, message: Sample, model: DiffusionModel, spec: SampleSpec, plan: Plan, sequence) -> Outline:
        network = model.high_noise
        batch, _, *size = message.latent.shape
        grid = tuple(length // patch for length, patch in zip(size, network.config.patch_size))
        tokens = math.prod(grid)
        chunk, text_tokens = sequence.chunk_of(tokens), message.positive.text.shape[1]
        work = work_of(network.config, len(network.blocks), batch, tokens, text_tokens, on_rank=chunk)
        width = network.config.num_attention_heads * network.config.attention_head_dim
        experts = tuple(model.name_at(timestep) for timestep in schedule_of(spec))
        pixels = 64 * math.prod(message.latent.shape[3:])
        per_token = conditioning.timesteps_of(message, model, torch.device("cpu")).ndim == 2
        taken = taken_by(network.config, batch * chunk, model.dtype.itemsize, per_token)
        return Outline(
            experts=experts,
            known=known_of(message.calibration, tuple(model.adapters), model.defaults, width, pixels),
            grid=grid,
            own=sequence.own(tokens),
            branches=2 if model.guided(spec) and plan.cfg == 1 else 1,
            output=batch * chunk * width * model.dtype.itemsize,
            room=max(0, devices.room(self.device) - taken),
            ring=plan.ring,
            work=work,
        )

    def _denoise(
        self, job, stage: str, model: DiffusionModel, spec: SampleSpec, cfg_group, acceleration: Acceleration, **hooks
    ) -> Tensor:
        """The denoised latent, not normalised, on the CPU."""
        message = job.message
        branches = conditioning.branches_of(message, model, self.device)
        timesteps = conditioning.timesteps_of(message, model, self.device)
        contexts, working = {}, None  # of the expert that works now: True is the low-noise one

        def predict(latent: Tensor, timestep: float, step: Step) -> Tensor:
            nonlocal contexts, working
            low_noise = model.is_low_noise(timestep)
            if low_noise != working:
                contexts, working = {name: branch.context() for name, branch in branches.items()}, low_noise
            expert = model.expert_at(timestep)
            scale = spec.low_noise_guidance if low_noise else spec.guidance_scale
            x = latent.to(self.device, model.dtype)

            def branch(name: str) -> Tensor:
                if name == "uncond" or cfg_group is not None or scale == 1.0:  # this rank's last of the step
                    model.expect(step.following)
                passing = acceleration.passing(At(model.name_at(timestep), name, step.number))
                return expert(branches[name].beside(x), timestep * timesteps, contexts[name], passing)

            return guided(branch, scale, cfg_group).float().cpu()

        def on_step(step: int, total: int, foreseen: Tensor) -> None:
            acceleration.tally.stepped()
            job.progress(stage, step, total)
            if message.preview and stage == "denoise" and model.latent_rgb is not None:
                job.preview(step, total, _picture(foreseen, model))
            job.check_together()

        start = conditioning.start_of(message, model)
        known = conditioning.known_of(message, start, model)
        try:
            job.check_together()
            acceleration.tally.start()
            latent = denoise(predict, spec, start, on_step, known=known, **hooks)
        finally:
            for expert in model.experts:
                expert.forget()
        return latent * model.latents_std + model.latents_mean


def _settings(spec: SampleSpec, model: DiffusionModel) -> dict[str, float]:
    """What the job was done with, whether it was given or the model's own."""
    low_noise = {} if model.low_noise is None else {"low-noise guidance": spec.low_noise_guidance}
    shift = {} if spec.sigmas else {"shift": spec.shift}
    return {"steps": spec.total_steps, "guidance": spec.guidance_scale} | low_noise | shift


def _require_agreement(spec: SampleSpec, model: DiffusionModel) -> None:
    """Raises ValueError on all ranks alike where a file that says how the model is run changed between their reading
    it: they would make different numbers of steps, and wait for each other."""
    digest = zlib.crc32(repr((spec, model.boundary)).encode())
    if highest(digest) != -highest(-digest):
        raise ValueError("The model's own steps, guidance, shift or boundary changed while ranks read them. Run again.")


def _said(warnings: list[str]) -> dict[str, list[str]]:
    """What the caller of a job is to read, each in a sentence or more."""
    return {"warnings": warnings} if warnings else {}


def _each_frame(job, stage: str):
    """What a VAE calls before each latent frame: the job's progress, and its end where that is asked for."""

    def on_frame(frame: int, total: int) -> None:
        job.check_together()
        job.progress(stage, frame, total)

    return on_frame


def _picture(foreseen: Tensor, model: DiffusionModel) -> Tensor:
    """uint8 [H,W,3] of the middle frame of a normalised latent."""
    frame = foreseen[0, :, foreseen.shape[2] // 2]  # [C,H,W]
    rgb = frame.movedim(0, -1) @ model.latent_rgb + model.latent_rgb_bias
    return rgb.add(1).mul(127.5).clamp(0, 255).to(torch.uint8)


def _done(job, **answer) -> Done:
    return Done(job=job.message.job, seconds=job.seconds, **answer)
