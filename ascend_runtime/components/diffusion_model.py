"""Loads a diffusion model: reads its one or two experts, quantizes and places them, and applies LoRAs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..checkpoints.reader import BytesRead, Places, load_weights, nbytes
from ..hardware import devices
from ..models.defaults import Defaults
from ..models.family import Family
from ..models.shared.conditioning import Conditioner
from ..models.shared.latents import Latents
from ..models.shared.quantized import (
    QUANTIZATION_SCHEMES,
    check_static_steps,
    prefer_layouts,
    linears,
    quantize,
    quantized_parameters,
)
from ..models.shared.transformer import VideoTransformer
from ..ops import check_quantized
from ..parallel.fsdp import ShardedWeights, Sharding
from ..recognition.component import Component
from ..recognition.defaults import defaults_in
from ..recognition.folders import has_low_noise
from ..recognition.layout import find_transformer
from ..specs import DiffusionModelSpec, SampleSpec
from ..specs.models import require_no_loras
from .experts import HIGH_NOISE, LOW_NOISE, ExpertSwap, HostWeights
from .loras import Adapter, LorasInUse, LoraTarget, by_expert, changed_by, read_loras
from .model_config import boundary_of, check_experts
from .networks import dtype_named, empty_network

logger = logging.getLogger(__name__)

ROOM_TO_COMPUTE = 8 * 2**30  # bytes that must stay free next to two experts: a 14B block at 1280 x 720 x 81 on one card


@dataclass
class DiffusionModel:
    """The experts of a model (`low_noise` is None if it has one expert) and what sampling needs to know about them."""

    high_noise: VideoTransformer
    low_noise: VideoTransformer | None
    defaults: Defaults
    boundary: float
    family: Family
    latents: Latents
    device: torch.device
    dtype: torch.dtype
    adapters: dict[str, Adapter]  # by expert
    swap: ExpertSwap | None = None  # set if the two experts take turns in one network on the device
    warmed: set = field(default_factory=set)  # kinds of jobs that were warmed up since the model was loaded

    @cached_property
    def conditioner(self) -> Conditioner:
        return self.family.conditioner(self.high_noise.config, self.latents)

    def pixels_of(self, latent: tuple[int, ...]) -> int:
        """The number of pixels of a frame whose latent [B,C,T,H,W] has this shape."""
        form = self.family.form(self.high_noise.config)
        return form.spatial**2 * math.prod(latent[3:])

    @property
    def experts(self) -> list[VideoTransformer]:
        return [expert for expert in (self.high_noise, self.low_noise) if expert is not None]

    @property
    def warnings(self) -> list[str]:
        """Warnings about the LoRAs in use, each once."""
        return [*dict.fromkeys(text for adapter in self.adapters.values() for text in adapter.warnings)]

    def expert_at(self, timestep: float) -> VideoTransformer:
        """The expert for a timestep in 0..1000."""
        if self.swap is not None:
            self.swap.use(self.name_at(timestep))
        return self.low_noise if self.is_low_noise(timestep) else self.high_noise

    def expect(self, timestep: float | None) -> None:
        """Makes the next pass prefetch the expert of the timestep after it; None: that of a new video's first."""
        if self.swap is not None:
            low_noise = timestep is not None and self.is_low_noise(timestep)
            self.swap.fetch_ahead(LOW_NOISE if low_noise else HIGH_NOISE)

    def guided(self, spec: SampleSpec) -> bool:
        """Whether any step uses guidance, and so needs the uncond branch."""
        return spec.guidance_scale != 1.0 or (self.low_noise is not None and spec.low_noise_guidance != 1.0)

    def name_at(self, timestep: float) -> str:
        """The name of the expert for a timestep in 0..1000."""
        return LOW_NOISE if self.is_low_noise(timestep) else HIGH_NOISE

    def is_low_noise(self, timestep: float) -> bool:
        return self.low_noise is not None and timestep < self.boundary * 1000


@dataclass(frozen=True)
class _Unread:
    """An expert before its weights are read: a network on the meta device that all weights on disk fit.

    scales_of: the names of the scales of the weights that are quantized on the fly. lora: the target of its LoRAs.
    """

    component: Component
    network: VideoTransformer
    places: Places
    scales_of: dict[str, str]
    lora: LoraTarget

    @classmethod
    def of(cls, component: Component, sharding: Sharding, quantization: str, expert: str | None) -> _Unread:
        """expert: which of two experts this is; None: the model has one."""
        network = empty_network(component, sharding.tp)
        places = component.places_in(network)
        layers = [] if quantization == "none" else linears(network, component.family.weights.in_8_bits)
        quantize(network, {name: QUANTIZATION_SCHEMES[quantization] for name in layers}, component.part.blocks)
        scales = {f"{name}.weight": f"{name}.weight_scale" for name in layers}
        return cls(component, network, places, scales, LoraTarget(places, component.family.loras, expert))


def files(spec: DiffusionModelSpec) -> list[Component]:
    """The high-noise expert, and the low-noise expert if there is one."""
    found = [find_transformer(spec.path)]
    low_noise = spec.low_noise_path or spec.path
    if has_low_noise(low_noise):
        found.append(find_transformer(low_noise, "transformer_2"))
    elif spec.low_noise_path is not None:
        found.append(find_transformer(low_noise))
    if len(found) == 2 and found[0].shards == found[1].shards:
        raise ValueError(f"{found[0].shards[0]} is given as both experts. Give the low-noise expert's file, or none.")
    for component in found:
        if component.quantized is not None:
            _check_quantized_files(spec, component)
    return found


def _check_quantized_files(spec: DiffusionModelSpec, component: Component) -> None:
    file = component.quantized.file
    require_no_loras(spec.loras, f"{file} says that the model is quantized")
    if spec.quantization != "none":
        raise ValueError(
            f"quantization is {spec.quantization!r}, but {file} says that the model is quantized already. Set "
            "quantization to 'none' to use the files as they are."
        )


def load(
    spec: DiffusionModelSpec, found: list[Component], device, progress: BytesRead, sharding: Sharding
) -> DiffusionModel:
    dtype = dtype_named(spec.dtype, devices.default_dtype(device))
    formats = {name for component in found if component.quantized for name in component.quantized.algorithms}
    if spec.quantization != "none":
        formats.add(QUANTIZATION_SCHEMES[spec.quantization].algorithm)
    if formats:
        check_quantized(device, dtype, sorted(formats))
    latents = Latents(check_experts(found))
    defaults = defaults_in(found[0], experts=len(found))
    boundary = boundary_of(spec, found[0], defaults, len(found))
    unread = {
        expert: _Unread.of(component, sharding, spec.quantization, expert if len(found) == 2 else None)
        for expert, component in zip((HIGH_NOISE, LOW_NOISE), found)
    }
    for one in unread.values():
        check_static_steps(one.network, defaults.static_steps, defaults.source)
    can_swap = _can_swap(spec, [one.network for one in unread.values()], sharding)
    requested = by_expert(spec.loras, list(unread))
    loras = {expert: read_loras(requested[expert], one.lora) for expert, one in unread.items()}
    progress.expect(
        sum(nbytes(one.places) + nbytes(one.places, changed_by(loras[expert])) for expert, one in unread.items())
    )
    reader = _Reader(dtype, device, progress, sharding)
    networks, swap = reader.experts(unread, can_swap, always_swap=spec.experts == "swap")
    return DiffusionModel(
        adapters={
            expert: reader.adapter(one, loras[expert], networks[expert], swap and swap.expert(expert))
            for expert, one in unread.items()
        },
        high_noise=networks[HIGH_NOISE],
        low_noise=networks.get(LOW_NOISE),
        defaults=defaults,
        boundary=boundary,
        family=found[0].family,
        latents=latents,
        device=device,
        dtype=dtype,
        swap=swap,
    )


@dataclass(frozen=True)
class _Reader:
    """Loads experts onto this rank. dtype: of the blocks."""

    dtype: torch.dtype
    device: torch.device
    progress: BytesRead
    sharding: Sharding

    def experts(
        self, unread: dict[str, _Unread], can_swap: bool, always_swap: bool
    ) -> tuple[dict[str, VideoTransformer], ExpertSwap | None]:
        """The networks of all experts, and the swap if two of them take turns on the device."""
        high_noise = self._read(unread[HIGH_NOISE], self.device)
        if LOW_NOISE not in unread:
            return {HIGH_NOISE: self._laid_out(high_noise)}, None
        if can_swap and (always_swap or not _fits(high_noise, self.device)):  # ranks may decide differently
            idle = self._read(unread[LOW_NOISE], torch.device("cpu"))
            swap = ExpertSwap(high_noise, high_noise.units, dict(idle.named_parameters()), self.device)
            return {HIGH_NOISE: high_noise, LOW_NOISE: high_noise}, swap
        low_noise = self._read(unread[LOW_NOISE], self.device)
        return {HIGH_NOISE: self._laid_out(high_noise), LOW_NOISE: self._laid_out(low_noise)}, None

    def _laid_out(self, network: VideoTransformer) -> VideoTransformer:
        """Weights that FSDP shards keep torch's layout, as gathering copies them; so do those of experts in turns."""
        if self.sharding.mesh is None:
            prefer_layouts(network)
        return network

    def adapter(self, one: _Unread, loras: LorasInUse, network, on_host: HostWeights | None) -> Adapter:
        """The adapter of an expert's weights, which are on the device, or on the host if experts are swapped."""
        files = [file for file, _ in loras]
        share = self._share(one, network)
        if on_host is None:
            return Adapter(one.lora, network.get_parameter, share, self.device, files)
        return Adapter(one.lora, on_host.parameter, share, self.device, files, on_host.before_change)

    def _read(self, one: _Unread, device: torch.device) -> VideoTransformer:
        in_8_bits, fp32 = quantized_parameters(one.network), one.component.family.weights.fp32
        load_weights(
            one.network,
            one.places,
            dtype_of=lambda name: in_8_bits.get(name) or (torch.float32 if fp32(name) else self.dtype),
            device=device,
            share=self._share(one, one.network),
            on_bytes=self.progress.add,
            scales_of=one.scales_of,
        )
        return one.network.eval()

    def _share(self, one: _Unread, network: VideoTransformer) -> ShardedWeights:
        rules = one.component.family.weights
        return ShardedWeights(self.sharding, rules.cut_dim, rules.replicated, network.units)


def _can_swap(spec: DiffusionModelSpec, networks: list[VideoTransformer], sharding: Sharding) -> bool:
    """Whether two experts can take turns on the device. Raises ValueError if `spec` requires it and they cannot."""
    if len(networks) == 1 or spec.experts == "resident":
        return False
    one, other = ({name: (p.shape, p.dtype) for name, p in network.named_parameters()} for network in networks)
    same = one == other and dict(networks[0].config) == dict(networks[1].config)
    if sharding.mesh is None and same:
        return True
    if spec.experts == "swap":
        why = "fsdp shards their weights" if same else "their weights have different shapes"
        raise ValueError(f"experts is 'swap', but {why}. Set it to 'auto'.")
    return False


def _fits(loaded: VideoTransformer, device) -> bool:
    """Whether there is free memory for a second expert as large as `loaded` and for computing; logs it if not."""
    free, needed = devices.free_memory(device), sum(p.nbytes for p in loaded.parameters())
    if free is None or free >= needed + ROOM_TO_COMPUTE:
        return True
    logger.info(
        "The second expert needs %.1f GB, and %.1f GB more to compute in, but %.1f GB are free: two experts of the "
        "same shape take turns on the device.",
        needed / 1e9, ROOM_TO_COMPUTE / 1e9, free / 1e9,
    )  # fmt: skip
    return False
