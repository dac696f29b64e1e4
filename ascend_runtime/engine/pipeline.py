"""Runs jobs on a rank: load, encode, sample, decode. Does not use sockets."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from msgspec.structs import asdict, replace

from ..components import Components, DiffusionModel, HostMemory, TextEncoders
from ..errors import coded_error
from ..hardware import devices, memory
from ..hardware.environment import original, placed, suits_sharded
from ..models.family import Family
from ..models.shared.conditioning import Given
from ..models.shared.text import TEXT, GivenTokens, OnBlock, Picture
from ..models.shared.tiling import bytes_whole
from ..ops.finite import check_finite
from ..ops.precision import strict_float32
from ..parallel.fsdp import Sharding, sharding_of
from ..parallel.machines import gathered_texts, machines, sums_of_machines
from ..parallel.measured_link import measured_link
from ..parallel.mesh import all_alike, all_reduce_max, communicators
from ..planner.facts import Machine
from ..recognition.calibration_file import read_calibration
from ..recognition.layout import vae_form
from ..recognition.text_encoders import require_vision
from ..specs import DiffusionModelSpec, ParallelSpec, Plan, SampleSpec, TextEncoderSpec, VaeSpec, VisionSpec
from ..specs.record import DECODE, ENCODE_VIDEO, JobRecord
from ..wire.messages import CallSetting, Conditioning, Done, Sample
from ..wire.shared_memory import borrowed
from . import planning
from .denoising import StepsOfJob, denoised, standing_still
from .explaining import Explainer, Generated
from .generation import Generation, Ranks, Request, check_request, unguided, warm_up_of
from .guard.diagnosis import check_encoded
from .guard.frames import DoneFacts
from .model_calls import ModelCalls
from .profiling import Recorder
from .prompts import (
    MAX_KNOWN,
    Encoded,
    KnownPrompts,
    described_encoders,
    encoded_tokens,
    given_tokens,
    image_key,
    tokens_key,
    with_padding,
)
from .same_files.comparison import SameFiles
from .video import decode_video, encode_video

logger = logging.getLogger(__name__)

MOST_WIDENED = 2  # how many bytes a VAE's weights take for each byte on disk: bfloat16 that becomes float32


class RankPipeline:
    """Runs jobs on one rank; every public method takes a job (see job.py) and returns its `Done`.

    With the text encoder's placement "cpu", only rank 0 encodes; the others reply at once, and it uses the cores of
    those on its machine. All ranks work on all other jobs. link: between machines, if there are several.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = dist.get_rank()
        self.folders: dict[str, str] = {}  # of specs, as a client has them -> on this machine
        self.components = Components(device)
        self._variables = _of_first_rank(original(device.type, os.environ))
        self.prompts = KnownPrompts()  # on rank 0; kept when the encoder is freed, as it is small
        self.calls = ModelCalls(self._variables)
        self._facts = planning.KnownModels(self.components.state)  # used on rank 0
        self.explainer = Explainer(device, self.components, self._variables)
        self.link = measured_link(device.type)
        self.same_files = SameFiles(self.components.found)

    def ping(self, job) -> Done:
        """Returns `reply` floats from rank 0; fills this rank's part of the frames, if the message has any."""
        message = job.message
        if message.frames is not None:
            with borrowed(message.frames) as frames:
                job.wrote(message.frames, frames.tensor_split(dist.get_world_size())[self.rank].fill_(1.0))
        reply = torch.ones(message.reply) if message.reply and self.rank == 0 else None
        return _done(job, tensor=reply)

    def load(self, job) -> Done:
        message, warnings = job.message, []
        encoder, text_sharding = (None, None) if message.encoder is None else self._placed(message.encoder)
        if message.model is not None:
            sharding = self._sharding(self._plan(message.parallel), message.parallel)
        on_ranks = encoder if encoder and encoder.placement == "ranks" else None
        with self._loading(job, message.model, on_ranks, message.vae) as host_memory:
            if message.model is not None:
                model = self._component(message.model, job, sharding, host_memory, message.computing)
                warnings += model.warnings
            if encoder is not None:
                loaded = self._text_encoders(encoder, job, text_sharding, host_memory)
                warnings += [] if loaded is None else loaded.warnings
            if message.vae is not None:
                self._component(message.vae, job, host_memory=host_memory)
        self.explainer.sources(*filter(None, (message.model, encoder, message.vae)))  # so that no job reads a file
        return _done(job, info=_warnings(warnings))

    def encode(self, job) -> Done:
        """Encodes a prompt. If rank 0 has its result cached, no rank loads or drops an encoder."""
        spec, sharding = self._placed(job.message.encoder)
        key = None
        with job.together():
            if self.rank == 0:
                family = self.components.found(spec)[0].family
                encoding = family.text()
                key = spec, self.components.state(spec), encoding.clean(job.message.text), self._seen(job, spec, family)
        encoded, known = self._known_or(key, lambda: self._encoded(job, spec, sharding))
        if self.rank != 0:
            return _done(job)
        self.prompts.keep(key, encoded)
        info = _warnings(encoded.warnings) | _communicators(self.device) | ({"prompt": "known"} if known else {})
        results = encoding.embeddings(encoded.results)
        record = self._encoding_record(job, spec, {} if job.message.image is None else {"about": "image"})
        return _done(job, tensor=results.pop(TEXT), tensors=results, info=info, record=record)

    def _known_or(self, key: Hashable, encode: Callable[[], Encoded | None]) -> tuple[Encoded | None, bool]:
        """(what rank 0 has cached under a key, else what all ranks encode; whether it was cached). Collective."""
        encoded = self.prompts.get(key)
        known = not all_reduce_max(self.rank == 0 and encoded is None)
        return (encoded if known else encode()), known

    def _seen(self, job, spec: TextEncoderSpec, family: Family) -> Hashable:
        """What determines the image tokens of a prompt; None without an image. Raises ValueError for an image that
        cannot be read."""
        image = job.message.image
        if image is None:
            return None
        require_vision(family)
        check_finite(image, "The image")
        return self.components.state(spec.vision), image_key(image), job.message.image_interleave

    def _encoded(self, job, spec: TextEncoderSpec, sharding: Sharding) -> Encoded | None:
        """Runs the text encoders on the job's prompt; None on ranks that do not encode."""
        message, on_ranks = job.message, spec.placement == "ranks"
        vision = None if message.image is None else spec.vision
        with self._loading(job, spec, vision) if on_ranks else nullcontext() as host_memory:
            loaded = self._text_encoders(spec, job, sharding, host_memory)
            sees = loaded is not None and vision is not None
            tower = self._component(vision, job, sharding, host_memory) if sees else None
        if loaded is None:
            return None
        encoding, warnings = loaded.encoding, [*loaded.warnings]
        if tower is not None:
            encoding = encoding.about(Picture(tower.model, message.image, message.image_interleave))
            warnings += tower.warnings
        text = encoding.clean(message.text)
        with self._encoding(job, on_ranks) as on_block:
            results = encoding.encode(loaded.encoders, text, on_block)
        check_encoded(results, loaded, spec)
        return Encoded(results, [*warnings, *encoding.cut(loaded.encoders, text)])

    def encode_tokens(self, job) -> Done:
        """Encodes tokens as they are; like `encode`, once."""
        message, key = job.message, None
        spec, sharding = self._placed(message.encoder)
        given = given_tokens(message)
        with job.together():
            if self.rank == 0:
                key = spec, self.components.state(spec), tokens_key(message.part, given)
        encoded, known = self._known_or(key, lambda: self._encoded_tokens(job, spec, sharding, given))
        if self.rank != 0:
            return _done(job)
        if len(given.ids) <= MAX_KNOWN:
            self.prompts.keep(key, encoded)
        info = _warnings(encoded.warnings) | _communicators(self.device) | ({"tokens": "known"} if known else {})
        results = with_padding(encoded.results, given)
        record = self._encoding_record(job, spec, {"part": job.message.part})
        return _done(job, tensor=results.pop(TEXT), tensors=results, info=info, record=record)

    def _encoding_record(self, job, spec: TextEncoderSpec, settings: dict[str, str]) -> JobRecord | None:
        vision = [spec.vision] if "about" in settings else []
        return self.explainer.encoding(spec, self.explainer.sources(spec, *vision), settings)

    def _encoded_tokens(self, job, spec: TextEncoderSpec, sharding: Sharding, given: GivenTokens) -> Encoded | None:
        """Runs one text encoder on the job's tokens; None on ranks that do not encode."""
        part, on_ranks = job.message.part, spec.placement == "ranks"
        with self._loading(job, spec) if on_ranks else nullcontext() as host_memory:
            loaded = self._text_encoders(spec, job, sharding, host_memory)
        if loaded is None:
            return None
        with self._encoding(job, on_ranks) as on_block:
            results = encoded_tokens(loaded.encoding, part, loaded.encoders.get(part), given, on_block)
        check_encoded(results, loaded, spec)
        return Encoded(results, loaded.warnings)

    @contextmanager
    def _encoding(self, job, on_ranks: bool) -> Iterator[OnBlock]:
        """The stage in which text encoders run. Yields what to call before each block."""

        def on_block(index: int, total: int) -> None:
            if on_ranks:
                job.check_together()
            else:
                job.check()
            job.progress("encode", index + 1, total)

        with job.stage("encode"), nullcontext() if on_ranks else devices.all_cores():
            yield on_block

    def sample(self, job) -> Done:
        message = job.message
        plan = self._plan(message.parallel)
        sharding = self._sharding(plan, message.parallel)
        with self._loading(job, message.model) as host_memory:
            recorder = Recorder(message.profile, self.device, self.rank)
            model = self._component(message.model, job, sharding, host_memory, message.computing)
            spec = model.defaults.fill(message.spec, model.pixels_of(message.latent.shape))
            recorder.end_with(len(spec.computed_steps))
        sources = self.explainer.sources(message.model)
        _require_agreement(spec, model)
        request = _request(message, spec)
        check_request(model, request)
        request = dataclasses.replace(request, given=model.conditioner.read(request.given))
        plan = plan if model.guided(spec) else unguided(plan, message.acceleration)
        ranks = Ranks.arranged(plan, message.parallel, message.operators, model, self._variables)
        with job.together():
            generation = Generation.prepare(model, request, ranks)
        if message.warm_up:
            self._warm_up(job, model, request, ranks)
        devices.forget_peak(self.device)
        with job.stage("denoise"):
            latent, history, continued = denoised(
                generation, model, request, StepsOfJob(job, model, generation, recorder)
            )
        settings = _settings(request, model) | _history(spec, continued)
        info = plan.info | settings | recorder.info | generation.acceleration.facts()
        info |= _communicators(self.device) | _device_memory(self.device) | _peak_bytes(self.device) | _warnings(
            [*model.warnings, *model.conditioner.notes(request.given), *standing_still(latent, request)]
        )
        generated = Generated(message.latent.shape, plan, generation.acceleration, settings)
        record = self.explainer.sampling(message, sources, model, spec, generated)
        if self.rank != 0:
            return _done(job, info=info)
        return _done(job, tensor=latent, tensors=history, info=info, record=record)

    def _warm_up(self, job, model: DiffusionModel, request: Request, ranks: Ranks) -> None:
        """Runs two discarded steps, one per expert, unless this model has been warmed up for this kind of job."""
        kind = _kind_of_job(job.message, request.spec, ranks)
        if not all_reduce_max(kind not in model.warmed):  # after a failure, ranks may have different sets
            return
        request = warm_up_of(model, request)
        with job.together():
            generation = Generation.prepare(model, request, ranks)
        with job.stage("warm up"):
            denoised(generation, model, request, StepsOfJob(job, model, generation, stage="warm up"))
        model.warmed.add(kind)

    def velocity(self, job) -> Done:
        """Passes through a network, for a sampler outside of the ranks."""
        try:
            run, new = self.calls.run_of(job, lambda setting: self._model_of_calls(job, setting))
            with job.stage("denoise"):
                velocities = run.velocities(job)
        except BaseException:
            self.calls.forget()
            raise
        info = run.facts(job.message.step, job.seconds["denoise"]) | _device_memory(self.device)
        if new:
            info |= run.plan.info | _communicators(self.device) | _warnings(run.warnings)
            run.sources = self.explainer.sources(run.setting.model)
        record = self.explainer.calls(run.setting, run.sources, run.model, run.generated) if run.is_at_an_end else None
        return _done(job, tensor=velocities.cpu() if self.rank == 0 else None, info=info, record=record)

    def _model_of_calls(self, job, setting: CallSetting) -> tuple[DiffusionModel, Plan]:
        plan = self._plan(setting.parallel)
        sharding = self._sharding(plan, setting.parallel)
        with self._loading(job, setting.model) as host_memory:
            model = self._component(setting.model, job, sharding, host_memory, setting.computing)
        _require_agreement(None, model)
        return model, plan

    def decode(self, job) -> Done:
        message = job.message
        with borrowed(message.frames) as frames:
            vae = self._vae(job, "decode", message.latent.shape)
            with job.stage("decode"), self._precision(message.vae):
                on_written = partial(job.wrote, message.frames)
                facts = decode_video(
                    vae, message.latent, frames, _each_step(job, "decode"), message.vae.tiles, on_written
                )
        record = self._vae_record(DECODE, message.vae, vae, message.frames.shape, facts)
        return _done(job, info=facts | _communicators(self.device), record=record)

    def encode_video(self, job) -> Done:
        message = job.message
        with borrowed(message.latent) as latent:
            vae = self._vae(job, "encode", message.latent.shape)
            with job.stage("encode"), self._precision(message.vae):
                on_written = partial(job.wrote, message.latent)
                facts = encode_video(
                    vae, message.frames, latent, _each_step(job, "encode"), message.vae.tiles, on_written
                )
        record = self._vae_record(ENCODE_VIDEO, message.vae, vae, message.frames.shape, facts)
        return _done(job, info=facts | _communicators(self.device), record=record)

    def _vae_record(self, kind: str, spec: VaeSpec, vae, frames: Sequence[int], facts: DoneFacts) -> JobRecord | None:
        return self.explainer.vae(kind, spec, self.explainer.sources(spec), vae, frames, facts)

    def describe(self, job) -> Done:
        """Reads facts from files that a client needs before its next job. Rank 0 reads them, because a slow disk would
        block the client."""
        message, info = job.message, {}
        if self.rank == 0 and message.vae is not None:
            info["vae"] = dataclasses.astuple(vae_form(message.vae.path))
        if self.rank == 0 and message.model is not None:
            info["calibration"] = read_calibration(message.model.path)
        if self.rank == 0 and message.network is not None:
            info["network"] = self._network(message.network)
        tokenizer = None
        if self.rank == 0 and message.encoder is not None:
            info["encoders"], tokenizer = described_encoders(self.components.found(message.encoder))
        return _done(job, info=info, tensor=tokenizer)

    def _network(self, spec: DiffusionModelSpec) -> dict[str, Any]:
        """What `Runtime.network` returns."""
        component = self.components.found(spec)[0]
        family, config = component.family, component.config
        shapes = family.original_shapes(config)
        return {"family": family.name, "shapes": shapes, "channels": family.form(config).channels}

    def choose(self, job) -> Done:
        """Chooses a plan for a job; rank 0 does, from the memory that each rank has. Changes nothing."""
        machine, info = self._machine(), {}
        if self.rank == 0:
            message, holds = job.message, self.components.models.holds
            found = planning.plan_for(message.planned, machine, self._facts, holds, message.below, message.below_host)
            info["plan"] = msgspec.to_builtins(found)
        return _done(job, info=info)

    def _machine(self, encodes: bool = False) -> Machine:
        """What a job can use, if what the ranks hold makes room for it. encodes: it is one of text encoders, which take
        the place of the diffusion model that waits. Collective."""
        ranks, host = dist.get_world_size(), self._host_memory()
        each = devices.communicator_bytes(self.device)
        given = self.components.models.waiting_bytes if encodes else self.components.makes_room
        room = devices.room(self.device) + given + communicators() * each
        on_host = host.free + host.in_use + host.waiting + host.pinned
        return Machine(
            kind=self.device.type,
            card=planning.card_of(self.device),
            ranks=ranks,
            device_memory=-all_reduce_max(-room),
            host_memory=max(0, on_host - (0 if self.device.type == "cpu" else memory.ROOM)),
            communicator=each,
            hosts=machines().hosts,
            link=self.link,
        )

    def free(self, job) -> Done:
        self.calls.forget()
        self.components.free()
        return _done(job)

    def _plan(self, parallel: ParallelSpec) -> Plan:
        return parallel.resolve(dist.get_world_size(), guided=True)

    def _sharding(self, plan: Plan, parallel: ParallelSpec) -> Sharding:
        """The sharding of a model's weights. All ranks must call it, before any work that may fail on one of them."""
        return sharding_of(self.device.type, dist.get_world_size(), plan.tp, fsdp=bool(parallel.fsdp))

    @contextmanager
    def _loading(self, job, *specs) -> Iterator[HostMemory]:
        """Work in which ranks load the components of these specs (None: of none) independently, with the host's memory
        that all of them may use: one may read for minutes after another has failed. Afterwards a diffusion model waits
        on all ranks or on none. Raises ValueError on all ranks if machines have different files. Collective."""
        self.same_files.require(job, filter(None, specs))
        host_memory = self._host_memory()
        with job.together():
            yield host_memory
            self.same_files.require_unchanged()
        waiting = self.components.models.waiting
        if not all_alike(waiting and self.same_files.identity(waiting.key.spec)):
            self.components.models.give_way(host_memory)

    def _host_memory(self) -> HostMemory:
        """The same on all ranks: of each number, that of the machine with the least. All ranks must call it, before one
        of them loads."""
        held = sums_of_machines(torch.tensor(self.components.models.on_host)).amin(0)
        ranks = max(map(len, machines().members)) if machines().count > 1 else devices.local_ranks()
        return HostMemory(-all_reduce_max(-devices.host_memory()), *map(int, held), ranks)

    def _placed(self, spec: TextEncoderSpec) -> tuple[TextEncoderSpec, Sharding]:
        """The spec with its placement resolved, and the encoder's sharding. All ranks must call it, as `_sharding`."""
        if spec.placement == "auto" and self._may_choose_place:
            spec = replace(spec, placement="ranks" if self._encodes_on_ranks(spec) else "cpu")
        spec = placed(spec, self._variables)
        return spec, sharding_of(self.device.type, dist.get_world_size(), tp=1, fsdp=spec.placement == "ranks")

    @property
    def _may_choose_place(self) -> bool:
        """Whether text encoders may run on the ranks without being asked to: not on a CPU, not where a variable
        decides, and not on NPUs whose environment does not suit sharded weights, as they would have to start again."""
        suits = dist.get_world_size() == 1 or suits_sharded(self.device.type, os.environ)
        return self.device.type != "cpu" and "T5_LOAD_CPU" not in self._variables and suits

    def _encodes_on_ranks(self, spec: TextEncoderSpec) -> bool:
        """Whether text encoders are on the ranks, or go there as that is sooner. Rank 0 decides; collective."""
        machine, place = self._machine(encodes=True), "cpu"
        if self.rank == 0:
            place = self.components.place_of(spec) or planning.placement(spec, machine)
        return bool(all_reduce_max(place == "ranks"))

    def _text_encoders(
        self, spec: TextEncoderSpec, job, sharding: Sharding, host_memory: HostMemory | None
    ) -> TextEncoders | None:
        """The text encoders, or None if only rank 0 has them; then this rank's shard of earlier ones is freed."""
        if spec.placement == "ranks" or self.rank == 0:
            waits = spec.placement == "ranks" and self.components.models.waits_on_device
            taken = planning.encoder_bytes(spec, dist.get_world_size()) if waits else None
            return self._component(spec, job, sharding, host_memory, computing=taken)
        self.components.drop(TextEncoderSpec)
        self.components.drop(VisionSpec)
        return None

    def _vae(self, job, work: str, shape: Sequence[int]):
        """The VAE, and on a device the room for it to work on a latent [B,C,T,H,W] of this shape as one plane."""
        spec, waits = job.message.vae, self.components.models.waits_on_device
        with self._loading(job, spec) as host_memory:
            stored = sum(component.nbytes for component in self.components.found(spec))
            weights = MOST_WIDENED * stored if waits else None
            vae = self._component(spec, job, host_memory=host_memory, computing=weights)
            if waits and len(shape) == 5:
                self.components.models.leave_device(host_memory, bytes_whole(vae, work, *shape[2:]))
        return vae

    def _precision(self, spec: VaeSpec) -> AbstractContextManager[None]:
        return strict_float32(self.device) if spec.strict else nullcontext()

    def _component(
        self, spec, job, sharding: Sharding = Sharding(), host_memory: HostMemory | None = None,
        computing: int | None = None,
    ):  # fmt: skip
        def on_bytes(done: int, total: int) -> None:
            job.check()
            job.progress("load", done, total)

        with job.stage("load"):
            return self.components.get(spec, on_bytes, sharding, host_memory, computing)


def _of_first_rank(variables: dict[str, str]) -> dict[str, str]:
    """The original systems' variables of the first rank, as another machine's environment may have others: ranks that
    decide by different ones would wait for each other. Collective."""
    if machines().count == 1:
        return variables
    first = msgspec.json.decode(gathered_texts(msgspec.json.encode(variables).decode())[0], type=dict[str, str])
    if first != variables:
        logger.warning("The first machine's variables hold on all machines: %s instead of %s.", first, variables)
    return first


def _request(message: Sample, spec: SampleSpec) -> Request:
    """The request of a sampling job. spec: with the model's own values filled in."""
    prompts = {"positive": message.positive, "negative": message.negative}
    prompts = {name: one for name, one in prompts.items() if one is not None}
    given = Given(message.latent, message.noise_mask, prompts, spec.embedded_guidance)
    return Request(given, spec, message.acceleration, message.calibration, message.history)


def _kind_of_job(message: Sample, spec: SampleSpec, ranks: Ranks) -> Hashable:
    """A key that is equal for jobs with the same operators on the same shapes."""
    rainfusion = message.acceleration.rainfusion and replace(message.acceleration.rainfusion, start=1)
    shapes = tuple(t is not None and t.shape for t in (message.latent, message.noise_mask))
    shapes += tuple(_shapes(one) for one in (message.positive, message.negative) if one is not None)
    branches = (spec.guidance_scale != 1.0, spec.low_noise_guidance != 1.0)
    return ranks.plan, message.parallel, message.operators, rainfusion, shapes, branches


def _shapes(given: Conditioning) -> Hashable:
    """The shapes of a conditioning's tensors by name, and the names of its numbers."""
    fields = asdict(given)
    tensors = fields.pop("tensors") | fields
    numbers = frozenset(tensors.pop("numbers"))
    return numbers, frozenset((name, tensor.shape) for name, tensor in tensors.items() if tensor is not None)


def _settings(request: Request, model: DiffusionModel) -> dict[str, float | str]:
    """The settings that the job used, both given ones and the model's own, and how it was distilled, if it was."""
    spec, scale = request.spec, model.conditioner.embedded_guidance(request.given.prompts["positive"], request.given)
    low_noise = {} if model.low_noise is None else {"low-noise guidance": spec.low_noise_guidance}
    shift = {} if spec.sigmas else {"shift": spec.shift}
    embedded = {} if scale is None else {"embedded guidance": scale}
    steps = spec.computed_steps
    part = {} if len(steps) == spec.total_steps else {"first step": steps.start, "end step": steps.stop}
    distilled = {} if model.defaults.distilled is None else {"distilled": model.defaults.distilled}
    settings = {"steps": spec.total_steps, "guidance": spec.guidance_scale}
    return settings | low_noise | embedded | shift | part | distilled


def _history(spec: SampleSpec, continued: bool) -> dict[str, str]:
    """The setting that says whether a multistep solver knew the steps before its part of a run."""
    needs_earlier_steps = spec.start_step and not spec.add_noise and spec.solver != "euler"
    return {"history": "used" if continued else "missing"} if needs_earlier_steps else {}


def _require_agreement(spec: SampleSpec | None, model: DiffusionModel) -> None:
    """Raises ValueError on all ranks if they have read different settings, because a file of the model changed
    meanwhile. With different numbers of steps, they would wait for each other."""
    if not all_alike((spec, model.boundary, model.defaults.static_steps)):
        raise coded_error(
            "AV-1315", "The model's own steps, guidance, shift or boundary changed while ranks read them. Try again."
        )


def _device_memory(device: torch.device) -> dict[str, str]:
    """The `info` entry for the most memory that torch took from this rank's device; none on a CPU."""
    peak = devices.peak_memory(device)
    return {} if peak is None else {"device memory": f"{peak / 1e9:.2f} GB"}


def _peak_bytes(device: torch.device) -> dict[str, int]:
    """The same in bytes, of the rank that took the most. Collective."""
    peak = devices.peak_memory(device)
    return {} if peak is None else {"peak bytes": all_reduce_max(peak)}


def _warnings(warnings: list[str]) -> dict[str, list[str]]:
    """The `info` entry for warnings to the user, each a sentence or more."""
    return {"warnings": warnings} if warnings else {}


def _communicators(device: torch.device) -> dict[str, str]:
    """The `info` entry for device memory that torch does not count; none if there is none."""
    number = communicators()
    taken = number * devices.communicator_bytes(device)
    return {"communicators": f"{number} a rank, {taken / 1e9:.1f} GB"} if taken else {}


def _each_step(job, stage: str):
    """The VAE's callback before each step: checks for a cancel and reports progress."""

    def on_step(step: int, total: int) -> None:
        job.check_together()
        job.progress(stage, step, total)

    return on_step


def _done(job, **answer) -> Done:
    return Done(job=job.message.job, seconds=job.seconds, **answer)
