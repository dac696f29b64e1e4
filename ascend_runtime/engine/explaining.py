"""Makes what a video's metadata say about a job (specs/record.py), on rank 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from msgspec.structs import asdict

from ..acceleration.accelerators import Acceleration
from ..checkpoints.digest import digests_of, file_digest, joint_digest
from ..components import Components, DiffusionModel
from ..hardware import devices
from ..hardware.environment import overlaps, with_defaults
from ..models.family import TRANSFORMER
from ..models.shared.vae import VideoVae
from ..ops import way_of
from ..recognition.calibration_file import calibration_digests
from ..recognition.component import Component
from ..recognition.lora.describing import forms_in
from ..recognition.lora.files import fingerprint
from ..recognition.lora.scale import weights_file
from ..specs import (
    AccelerationSpec,
    DiffusionModelSpec,
    LoraSpec,
    ParallelSpec,
    Plan,
    SampleSpec,
    TextEncoderSpec,
    VaeSpec,
)
from ..specs.record import (
    DENOISE,
    ENCODE,
    MAX_FILES,
    MAX_LORAS,
    MAX_NUMBERS,
    MAX_TEXT,
    HostRecord,
    JobRecord,
    LoraRecord,
    PartRecord,
    Settings,
)
from ..wire.messages import CallSetting, Sample
from .guard.frames import DoneFacts

logger = logging.getLogger(__name__)

SAVED = ("flops_saved", "predicted_speed_up", "seen_speed_up", "mean_density", "attentions_reused", "blocks_skipped")


@dataclass(frozen=True)
class Sources:
    """The files of a job."""

    parts: list[PartRecord] = field(default_factory=list)
    loras: list[LoraRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Generated:
    """How a latent of this shape [B,C,T,H,W] was denoised. settings: by name, as they were used."""

    latent: Sequence[int]
    plan: Plan
    acceleration: Acceleration
    settings: Mapping[str, Any] = field(default_factory=dict)


class Explainer:
    """Describes jobs on one rank; on other ranks than 0, it makes nothing and reads nothing.

    environ: the original systems' environment variables.
    """

    def __init__(self, device: torch.device, components: Components, environ: Mapping[str, str]):
        self._device, self._components, self._environ = device, components, environ
        self._here = dist.get_rank() == 0

    def sources(self, *specs) -> Sources:
        """The digests of the components of these specs, which have just been loaded. Raises nothing if files are gone
        meanwhile: the other ranks go on with the job."""
        if not self._here:
            return Sources()
        try:
            parts = [part for spec in specs for part in _parts(self._components.found(spec))]
        except (OSError, ValueError) as error:
            logger.warning("The video's metadata will name no model: %s", error)
            parts = []
        loras = [_lora(one) for spec in specs if isinstance(spec, DiffusionModelSpec) for one in spec.loras]
        return Sources(parts, loras[:MAX_LORAS])

    def sampling(
        self, message: Sample, sources: Sources, model: DiffusionModel, spec: SampleSpec, generated: Generated
    ) -> JobRecord | None:
        """The record of a sampling job. spec: with the model's own values filled in."""
        settings = {
            "seed": spec.seed, "solver": spec.solver, "schedule": None if spec.sigmas else spec.schedule,
            "sigmas": spec.sigmas and [*spec.sigmas], "image start": spec.image_start or None,
            "masked": True if message.noise_mask is not None else None,
            "noise added": None if spec.add_noise else False, "noise left": spec.leftover_noise or None,
        }  # fmt: skip
        return self._denoised(message, sources, model, generated, settings | generated.settings)

    def calls(
        self, setting: CallSetting, sources: Sources, model: DiffusionModel, generated: Generated
    ) -> JobRecord | None:
        """The record of the model calls of a sampler outside of the ranks."""
        sigmas = setting.run.sigmas
        settings = {"steps": len(sigmas) - 1, "sigmas": [*sigmas]}
        return self._denoised(setting, sources, model, generated, settings)

    def encoding(self, spec: TextEncoderSpec, sources: Sources, settings: Mapping[str, Any]) -> JobRecord | None:
        return self._record(ENCODE, sources, {"placement": spec.placement, "dtype": spec.dtype} | settings)

    def vae(self, kind: str, spec: VaeSpec, sources: Sources, vae: VideoVae, frames: Sequence[int],
            facts: DoneFacts) -> JobRecord | None:  # fmt: skip
        """The record of decoding or encoding. frames: the shape [T,H,W,3]."""
        settings = {"tiles": spec.tiles, "strict": spec.strict, "divided into": facts.get("tiles")}
        return self._record(kind, sources, settings, dtype=_dtype_name(vae.dtype), size=[*frames[:3]])

    def _denoised(
        self, asked: Sample | CallSetting, sources: Sources, model: DiffusionModel, generated: Generated,
        settings: Mapping[str, Any],
    ) -> JobRecord | None:  # fmt: skip
        if not self._here:
            return None
        own = {"batch": generated.latent[0], "quantization": asked.model.quantization}
        if model.notes:
            own |= {"weights": " ".join(model.notes)}
        if model.low_noise is not None:
            own |= {"boundary": model.boundary, "experts": "swap" if model.swap else "resident"}
        calibration = asked.calibration if asked.acceleration.step_cache else {}
        return self._record(
            DENOISE, sources, settings | own, dtype=_dtype_name(model.dtype),
            size=_video_size(model, generated.latent), plan=self._plan(generated.plan, asked.parallel),
            operators={"operators": way_of(self._device)} | asdict(with_defaults(asked.operators, self._environ)),
            accelerators=_accelerators(generated.acceleration.spec), saved=_saved(generated.acceleration.facts()),
            calibration=calibration_digests(calibration),
        )  # fmt: skip

    def _plan(self, plan: Plan, parallel: ParallelSpec) -> Settings:
        exchanges = {"ring exchange": parallel.ring_exchange, "overlap": overlaps(parallel, self._environ)}
        return plan.info | {"fsdp": bool(parallel.fsdp)} | exchanges

    def _record(self, kind: str, sources: Sources, settings: Mapping[str, Any], **further) -> JobRecord | None:
        if not self._here:
            return None
        threads = torch.get_num_threads() if self._device.type == "cpu" else None
        host = HostRecord(device=self._device.type, card=devices.model_name(self._device),
                          ranks=dist.get_world_size(), threads=threads)  # fmt: skip
        return JobRecord(kind=kind, parts=sources.parts, loras=sources.loras, host=host,
                         settings=_given(settings), **further)  # fmt: skip


def _video_size(model: DiffusionModel, latent: Sequence[int]) -> list[int]:
    """[frames, height, width] of the video of a latent [B,C,T,H,W]."""
    form = model.family.form(model.high_noise.config)
    frames, height, width = latent[2:]
    return [(frames - 1) * form.temporal + 1, height * form.spatial, width * form.spatial]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _accelerators(spec: AccelerationSpec) -> dict[str, Settings]:
    """The settings of each accelerator, by its kind. spec: with the values of presets."""
    fields = {kind: getattr(spec, kind) for kind in spec.kinds}
    return {kind: _given(_flat(msgspec.to_builtins(one))) for kind, one in fields.items()}


def _saved(facts: Mapping[str, Any]) -> Settings:
    """What accelerators saved. facts: of a job, with its "acceleration" if it has any."""
    own = facts.get("acceleration")
    if own is None:
        return {}
    return _given({name: own[name] for name in SAVED}) | {"steps_reusing": len(own["steps_reusing"])}


def _given(settings: Mapping[str, Any]) -> Settings:
    """The settings that are not None, within the bounds of a record."""
    return {name: _bounded(value) for name, value in settings.items() if value is not None}


def _bounded(value: Any) -> Any:
    """JSON has no infinite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value[:MAX_TEXT] if isinstance(value, str) else value[:MAX_NUMBERS] if isinstance(value, list) else value


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """A preset as its name."""
    return {name: value["name"] if isinstance(value, dict) else value for name, value in values.items()}


def _parts(found: list[Component]) -> list[PartRecord]:
    transformers = sum(one.kind.name == TRANSFORMER for one in found)
    return [_part(one, transformers) for one in found]


def _part(component: Component, transformers: int) -> PartRecord:
    name = component.kind.what
    if component.kind.name == TRANSFORMER:
        name = component.family.defaults(component.config, transformers).name
    digests = digests_of(component.files)
    return PartRecord(part=component.kind.name, name=name, digest=joint_digest(digests), files=digests[:MAX_FILES])


def _lora(spec: LoraSpec) -> LoraRecord:
    digest, form = None, ""
    try:
        file = weights_file(Path(spec.path))
        digest, form = file_digest(file), forms_in(str(file), fingerprint(spec.path))
    except (OSError, ValueError) as error:
        logger.warning("There is no digest of %s: %s", spec.path, error)
    return LoraRecord(file=digest, strength=spec.strength, expert=spec.expert, misfits=spec.misfits, form=form)
