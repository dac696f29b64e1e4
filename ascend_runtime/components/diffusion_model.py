"""Loads a diffusion model: reads its one or two experts, quantizes and places them, and applies LoRAs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.formats.parts import Slices
from ..checkpoints.reader import BytesRead, LocalWeights, Places, assign, load_weights, nbytes
from ..hardware import devices
from ..models.defaults import Defaults
from ..models.family import Family
from ..models.shared.conditioning import Conditioner
from ..models.shared.latents import Latents
from ..models.shared.quantized.replacing import (
    QUANTIZATION_SCHEMES,
    block_types,
    linears,
    prefer_layouts,
    quantize,
    quantized_parameters,
)
from ..models.shared.quantized.static import check_static_steps
from ..models.shared.quantized.lora import LoraTerm
from ..models.shared.transformer import VideoTransformer
from ..ops import check_quantized
from ..parallel.fsdp import ShardedWeights, Sharding
from ..recognition.component import Component
from ..recognition.defaults import defaults_for
from ..recognition.experts import boundary_of, find_experts
from ..specs import DiffusionModelSpec, SampleSpec
from .experts import HIGH_NOISE, LOW_NOISE, ExpertSwap, HostWeights
from .loras.adapter import Adapter
from .loras.requests import LorasInUse, LoraTarget, by_expert, merged_by, read_for, read_loras
from .loras.terms import QuantizedTerms, nbytes_of
from .model_config import check_experts
from .networks import dtype_named, empty_network
from .packed import keep_packed, kept_in_few_bits
from .pinned import Layout, Weights, require_room
from .room import Room

logger = logging.getLogger(__name__)


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
    notes: tuple[str, ...] = ()  # about how it is kept, for the user
    warmed: set = field(default_factory=set)  # kinds of jobs that were warmed up since the model was loaded
    standing: Any = None  # what the engine keeps of a run between its calls; freed with the model

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
    def lora_bytes(self) -> int:
        """What LoRAs take next to quantized weights, where these are."""
        return sum(adapter.nbytes for adapter in self.adapters.values())

    @property
    def warnings(self) -> list[str]:
        """Warnings about the LoRAs in use, and how the weights are kept, each once."""
        return [*dict.fromkeys([*self.notes, *(text for one in self.adapters.values() for text in one.warnings)])]

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
        return cls(component, network, places, scales, LoraTarget.of(network, places, component.family.loras, expert))

    def is_mapped(self, name: str, kept: Tensor) -> bool:
        """Whether a CPU maps the parameter of this name from its file, as it is kept the way it is stored."""
        place = self.places.get(name)
        return place is not None and place.is_kept_as_stored(kept.dtype) and place.shape == kept.shape


def files(spec: DiffusionModelSpec) -> list[Component]:
    return find_experts(spec)


@dataclass(frozen=True)
class Opened:
    """A diffusion model whose files fit it and its LoRAs, and whose weights are not read yet. can_swap: whether its
    experts can take turns. notes: about how it is to be kept, for the user."""

    spec: DiffusionModelSpec
    unread: dict[str, _Unread]  # by expert
    loras: dict[str, LorasInUse]
    defaults: Defaults
    boundary: float
    latents: Latents
    can_swap: bool
    reader: _Reader
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """What the experts and their LoRAs take on this rank's device; on a CPU, without what is mapped from files."""
        return sum(self.reader.nbytes(one) for one in self.unread.values()) + self.reader.terms(self.unread, self.loras)

    def read(self) -> DiffusionModel:
        unread, reader, progress = self.unread, self.reader, self.reader.progress
        progress.expect(sum(nbytes(one.places) + nbytes(one.places, read_for(self.loras[expert], one.lora))
                            for expert, one in unread.items()))  # fmt: skip
        turns = reader.in_turns(unread, self.loras, always=self.spec.experts == "swap") if self.can_swap else None
        networks, swap = reader.experts(unread, turns)
        return DiffusionModel(
            adapters={
                expert: reader.adapter(one, self.loras[expert], networks[expert], swap and swap.expert(expert))
                for expert, one in unread.items()
            },
            high_noise=networks[HIGH_NOISE],
            low_noise=networks.get(LOW_NOISE),
            defaults=self.defaults,
            boundary=self.boundary,
            family=unread[HIGH_NOISE].component.family,
            latents=self.latents,
            device=reader.room.device,
            dtype=reader.dtype,
            swap=swap,
            notes=self.notes,
        )


def opened(spec: DiffusionModelSpec, found: list[Component], room: Room, progress: BytesRead) -> Opened:
    """Checks the model's files and LoRAs by their headers; nothing is allocated. Raises ValueError if they do not
    fit."""
    device, sharding = room.device, room.sharding
    dtype = dtype_named(spec.dtype, devices.default_dtype(device))
    formats = {name for component in found if component.quantized for name in component.quantized.algorithms}
    if spec.quantization != "none":
        formats.add(QUANTIZATION_SCHEMES[spec.quantization].algorithm)
    if formats:
        check_quantized(device, dtype, sorted(formats))
    latents = Latents(check_experts(found))
    found, of_marks = kept_in_few_bits(found, spec, room, dtype)
    found, of_blocks = keep_packed(found, spec, room, dtype)
    defaults = defaults_for(spec, found[0], experts=len(found))
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
    reader, notes = _Reader(dtype, room, progress), of_marks + of_blocks
    return Opened(spec, unread, loras, defaults, boundary, latents, can_swap, reader, notes)


@dataclass(frozen=True)
class _Reader:
    """Loads experts onto this rank. dtype: of the blocks."""

    dtype: torch.dtype
    room: Room
    progress: BytesRead

    def in_turns(self, unread: dict[str, _Unread], loras: dict[str, LorasInUse], always: bool) -> Layout | None:
        """Where two experts wait on the host if they take turns on the device, else None. Nothing is read yet.

        Raises ValueError if the host has too little memory.
        """
        weights = {expert: self._kept(one) for expert, one in unread.items()}
        if not always and _fits(weights, self.room, self.terms(unread, loras)):
            return None
        layout = Layout.of(weights)
        changed = [weights[expert][name].nbytes
                   for expert, one in unread.items() for name in merged_by(loras[expert], one.lora)]  # fmt: skip
        free = self.room.free_host(layout.nbytes + sum(changed), pinned=True)
        require_room(layout, sum(changed), free, self.room.host_memory.ranks)
        return layout

    def experts(
        self, unread: dict[str, _Unread], turns: Layout | None
    ) -> tuple[dict[str, VideoTransformer], ExpertSwap | None]:
        """The networks of all experts, and the swap if two of them take turns on the device.

        turns: where they wait on the host.
        """
        device = self.room.device
        if turns is None:
            shares = {expert: self._share(one, one.network) for expert, one in unread.items()}
            read = {expert: self._read(one, device, shares[expert]) for expert, one in unread.items()}
            return {expert: self._laid_out(network) for expert, network in read.items()}, None
        host = turns.allocated(device)
        for expert, one in unread.items():
            self._read(one, torch.device("cpu"), _IntoMemory(self._share(one, one.network), host[expert]))
        network = unread[HIGH_NOISE].network
        for name, weight in host[HIGH_NOISE].items():
            assign(network, name, weight.to(device, copy=True))
        swap = ExpertSwap(network, network.units, host, device)
        return dict.fromkeys(unread, network), swap

    def _laid_out(self, network: VideoTransformer) -> VideoTransformer:
        """Weights that FSDP shards keep torch's layout, as gathering copies them; so do those of experts in turns."""
        if self.room.sharding.mesh is None:
            prefer_layouts(network)
        return network

    def adapter(self, one: _Unread, loras: LorasInUse, network, on_host: HostWeights | None) -> Adapter:
        """The adapter of an expert's weights, which are on the device, or on the host if experts are swapped."""
        files = [file for file, _ in loras]
        share, device = self._share(one, network), self.room.device

        def place(layer: str, term: LoraTerm | None) -> None:
            network.get_submodule(layer).lora = term

        terms = QuantizedTerms(one.lora, place if on_host is None else on_host.place, share, device, self.dtype)
        if on_host is None:
            return Adapter(one.lora, network.get_parameter, share, device, files, terms=terms)
        return Adapter(one.lora, on_host.parameter, share, device, files, on_host.before_change, terms)

    def _read(self, one: _Unread, device: torch.device, share: LocalWeights) -> VideoTransformer:
        load_weights(
            one.network,
            one.places,
            dtype_of=self._dtypes(one),
            device=device,
            share=share,
            on_bytes=self.progress.add,
            scales_of=one.scales_of,
        )
        return one.network.eval()

    def nbytes(self, one: _Unread) -> int:
        """What this rank keeps of an expert; on a CPU, without what is mapped from files."""
        on_cpu = self.room.device.type == "cpu"
        return sum(x.nbytes for name, x in self._kept(one).items() if not (on_cpu and one.is_mapped(name, x)))

    def terms(self, unread: dict[str, _Unread], loras: dict[str, LorasInUse]) -> int:
        """What LoRAs take next to the quantized weights of all experts."""
        return sum(
            nbytes_of(loras[expert], one.lora, self._share(one, one.network), self.dtype)
            for expert, one in unread.items()
        )

    def _kept(self, one: _Unread) -> dict[str, Tensor]:
        """What this rank keeps of an expert, on the meta device."""
        share, dtype_of = self._share(one, one.network), self._dtypes(one)
        kept = {}
        for name, whole in one.network.state_dict().items():
            part = share.part(name, tuple(whole.shape)) or ...
            kept[name] = torch.empty_like(whole[part], dtype=dtype_of(name))
        return kept

    def _dtypes(self, one: _Unread) -> Callable[[str], torch.dtype]:
        """The dtype in which a parameter is kept, by name."""
        in_8_bits, fp32 = quantized_parameters(one.network), one.component.family.weights.fp32
        return lambda name: in_8_bits.get(name) or (torch.float32 if fp32(name) else self.dtype)

    def _share(self, one: _Unread, network: VideoTransformer) -> ShardedWeights:
        rules = one.component.family.weights
        return ShardedWeights(self.room.sharding, rules.cut_dim, rules.replicated, network.units)


@dataclass(frozen=True)
class _IntoMemory:
    """Local weights (see `checkpoints.reader.LocalWeights`) of which each moves into given memory, by name, as soon as
    it was read."""

    share: ShardedWeights
    memory: dict[str, Tensor]

    def prepare(self, module: nn.Module) -> None:
        self.share.prepare(module)

    def part(self, name: str, shape: tuple[int, ...]) -> Slices | None:
        return self.share.part(name, shape)

    def parameter(self, module: nn.Module, name: str, part: Tensor) -> Tensor:
        kept = self.memory[name]
        assert (kept.shape, kept.dtype) == (part.shape, part.dtype), (name, kept.shape, kept.dtype, part.shape)
        return kept.copy_(part)


def _can_swap(spec: DiffusionModelSpec, networks: list[VideoTransformer], sharding: Sharding) -> bool:
    """Whether two experts can take turns on the device. Raises ValueError if `spec` requires it and they cannot."""
    if len(networks) == 1 or spec.experts == "resident":
        return False
    one, other = ({name: (p.shape, p.dtype) for name, p in network.named_parameters()} for network in networks)
    same = one == other and dict(networks[0].config) == dict(networks[1].config)
    alike = block_types(networks[0]) == block_types(networks[1])
    if sharding.mesh is None and same and alike:
        return True
    if spec.experts == "swap":
        why = "their weights have different shapes" if not same else "their GGUF files have other types of weights"
        why = "fsdp shards their weights" if same and alike else why
        raise ValueError(f"experts is 'swap', but {why}. Set it to 'auto'.")
    return False


def _fits(weights: Weights, room: Room, terms: int) -> bool:
    """Whether the device has memory for all these weights, for so many bytes of LoRAs next to them, and for computing;
    logs it if not. Each rank decides for its own device. On a CPU, weights are mapped from their files."""
    needed = sum(x.nbytes for tensors in weights.values() for x in tensors.values()) + terms
    if room.device.type == "cpu" or (free := devices.room(room.device)) >= needed + room.computing:
        return True
    logger.info(
        "The two experts need %.1f GB, and %.1f GB more to compute in, but the device has %.1f GB: they take turns.",
        needed / 1e9, room.computing / 1e9, free / 1e9,
    )  # fmt: skip
    return False
