"""A diffusion model: its one or two experts, read, quantized, placed, and changed by LoRAs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from .. import devices
from ..accelerate.quantized import WAYS, linears, quantize, quantized_parameters
from ..checkpoints.layout import Component, find_transformer, has_low_noise
from ..checkpoints.reader import Places, Progress, check_weights, load_weights, nbytes
from ..experts import HIGH_NOISE, LOW_NOISE, ExpertSwap
from ..families import wan
from ..families.defaults import Defaults, defaults_in
from ..loras import Adapter, LorasInUse, by_expert, changed_by, read_loras
from ..ops import check_quantized
from ..parallel.fsdp import Share, Sharding
from ..specs import DiffusionModelSpec, SampleSpec, require_no_loras
from .model_config import boundary_of, check_experts
from .networks import as_described, dtype_named, empty_network, transformer_parameters

logger = logging.getLogger(__name__)

ROOM_TO_COMPUTE = 8 * 2**30  # bytes that must stay free beside two experts: a 14B block at 1280 x 720 x 81 on one card


@dataclass
class DiffusionModel:
    """The experts of a model (`low_noise` is None where there is one) and what sampling needs to know of them."""

    high_noise: wan.WanTransformer
    low_noise: wan.WanTransformer | None
    defaults: Defaults
    boundary: float
    latents_mean: torch.Tensor  # [1,C,1,1,1], fp32, on the CPU
    latents_std: torch.Tensor
    latent_rgb: torch.Tensor | None  # [C,3]; None where no table is known, and then there are no previews
    latent_rgb_bias: torch.Tensor  # [3]
    dtype: torch.dtype
    adapters: dict[str, Adapter]  # of each expert
    swap: ExpertSwap | None = None  # where the two experts are one network on the device, and take turns
    warmed: set = field(default_factory=set)  # kinds of jobs that were warmed up since it was loaded

    @property
    def experts(self) -> list[wan.WanTransformer]:
        return [expert for expert in (self.high_noise, self.low_noise) if expert is not None]

    @property
    def warnings(self) -> list[str]:
        """What is to be said of the LoRAs in it, each once."""
        return [*dict.fromkeys(said for adapter in self.adapters.values() for said in adapter.warnings)]

    def expert_at(self, timestep: float) -> wan.WanTransformer:
        """The expert for a timestep in 0..1000."""
        if self.swap is not None:
            self.swap.use(self.name_at(timestep))
        return self.low_noise if self.is_low_noise(timestep) else self.high_noise

    def expect(self, timestep: float | None) -> None:
        """Has the next pass fetch the expert of the timestep after it; None is another video's first."""
        if self.swap is not None:
            low_noise = timestep is not None and self.is_low_noise(timestep)
            self.swap.fetch_ahead(LOW_NOISE if low_noise else HIGH_NOISE)

    def guided(self, spec: SampleSpec) -> bool:
        """Whether any step needs the uncond branch."""
        return spec.guidance_scale != 1.0 or (self.low_noise is not None and spec.low_noise_guidance != 1.0)

    def name_at(self, timestep: float) -> str:
        """Of the expert for a timestep in 0..1000."""
        return LOW_NOISE if self.is_low_noise(timestep) else HIGH_NOISE

    def is_low_noise(self, timestep: float) -> bool:
        return self.low_noise is not None and timestep < self.boundary * 1000


@dataclass(frozen=True)
class _Unread:
    """A network on the meta device, and where its weights lie, all of which fit.

    scales_of: of the weights that are quantized as they are read, what their scales are called.
    """

    network: wan.WanTransformer
    places: Places
    scales_of: dict[str, str]

    @classmethod
    def of(cls, component: Component, sharding: Sharding, quantization: str) -> _Unread:
        network = empty_network("transformer", component)
        if sharding.tp.degree > 1:
            network = as_described(wan.WanTransformer(transformer_parameters(component.config), sharding.tp), component)
        places = check_weights(network, component.shards, component.rename, component.quantized, component.split)
        layers = [] if quantization == "none" else linears(network, wan.kept_in_8_bits)
        quantize(network, {name: WAYS[quantization] for name in layers})
        return cls(network, places, {f"{name}.weight": f"{name}.weight_scale" for name in layers})


def files(spec: DiffusionModelSpec) -> list[Component]:
    """The high-noise expert, and the low-noise one where there is one."""
    found = [find_transformer(spec.path)]
    low_noise = spec.low_noise_path or spec.path
    if has_low_noise(low_noise):
        found.append(find_transformer(low_noise, "transformer_2"))
    elif spec.low_noise_path is not None:
        found.append(find_transformer(low_noise))
    if len(found) == 2 and found[0].shards == found[1].shards:
        raise ValueError(f"{found[0].shards[0]} is given as both experts. Name the low-noise expert's file, or none.")
    for component in found:
        if component.quantized is not None:
            _check_quantized_files(spec, component)
    return found


def _check_quantized_files(spec: DiffusionModelSpec, component: Component) -> None:
    told_by = component.quantized.file
    require_no_loras(spec.loras, f"{told_by} says that the model is quantized")
    if spec.quantization != "none":
        raise ValueError(
            f"quantization is {spec.quantization!r}, but {told_by} says that the model is quantized already. Set it "
            "to 'none', which takes the files as they are."
        )


def load(
    spec: DiffusionModelSpec, found: list[Component], device, progress: Progress, sharding: Sharding
) -> DiffusionModel:
    dtype = dtype_named(spec.dtype, devices.default_dtype(device))
    if spec.quantization != "none" or any(component.quantized for component in found):
        check_quantized(device, dtype)
    latent_format = check_experts(found)
    defaults = defaults_in(found[0], experts=len(found))
    boundary = boundary_of(spec, found[0], defaults)
    unread = {
        expert: _Unread.of(component, sharding, spec.quantization)
        for expert, component in zip((HIGH_NOISE, LOW_NOISE), found)
    }
    can_swap = _can_swap(spec, [one.network for one in unread.values()], sharding)
    asked = by_expert(spec.loras, list(unread))
    loras = {
        expert: read_loras(asked[expert], one.places, _of_two(expert, unread)) for expert, one in unread.items()
    }
    progress.expect(
        sum(nbytes(one.places) + nbytes(one.places, changed_by(loras[expert])) for expert, one in unread.items())
    )
    high_noise = _load_transformer(unread[HIGH_NOISE], dtype, device, progress, sharding)
    low_noise, swap = None, None
    if can_swap and (spec.experts == "swap" or not _fits(high_noise, device)):  # ranks may decide differently
        idle = _load_transformer(unread[LOW_NOISE], dtype, torch.device("cpu"), progress, sharding)
        swap = ExpertSwap(high_noise, high_noise.units, dict(idle.named_parameters()), device)
        low_noise = high_noise
    elif LOW_NOISE in unread:
        low_noise = _load_transformer(unread[LOW_NOISE], dtype, device, progress, sharding)
    networks = {HIGH_NOISE: high_noise, LOW_NOISE: low_noise}
    return DiffusionModel(
        adapters={
            expert: _adapter(
                expert, networks[expert], one.places, loras[expert], swap, device, sharding, _of_two(expert, unread)
            )
            for expert, one in unread.items()
        },
        high_noise=high_noise,
        low_noise=low_noise,
        defaults=defaults,
        boundary=boundary,
        dtype=dtype,
        swap=swap,
        **latent_format,
    )


def _adapter(
    expert: str, network, places: Places, loras: LorasInUse, swap: ExpertSwap | None, device, sharding: Sharding,
    of_two: str | None,
) -> Adapter:  # fmt: skip
    """What changes the weights of an expert, where they are kept."""
    share, merged = _share(network, sharding), [file for file, _ in loras]
    if swap is None:
        return Adapter(places, network.get_parameter, share, device, merged, expert=of_two)
    return Adapter(places, swap.on_host(expert).__getitem__, share, device, merged, swap.outdate, of_two)


def _of_two(expert: str, experts) -> str | None:
    """The expert's name where there are two."""
    return expert if len(experts) == 2 else None


def _can_swap(spec: DiffusionModelSpec, networks: list[wan.WanTransformer], sharding: Sharding) -> bool:
    """Whether there are two experts which may take turns on the device. Raises ValueError where they are to and
    cannot."""
    if len(networks) == 1 or spec.experts == "resident":
        return False
    one, other = ({name: (p.shape, p.dtype) for name, p in network.named_parameters()} for network in networks)
    same = one == other and dict(networks[0].config) == dict(networks[1].config)
    if sharding.mesh is None and same:
        return True
    if spec.experts == "swap":
        why = "fsdp shares their weights" if same else "they are of different shapes"
        raise ValueError(f"experts is 'swap', but {why}: set it to 'auto'.")
    return False


def _fits(loaded: wan.WanTransformer, device) -> bool:
    """Whether a second expert as large as `loaded`, and room to compute, are free; says so where they are not."""
    free, needed = devices.free_memory(device), sum(p.nbytes for p in loaded.parameters())
    if free is None or free >= needed + ROOM_TO_COMPUTE:
        return True
    logger.info(
        "The second expert needs %.1f GB beside %.1f GB to compute in; %.1f GB are free: experts of one shape take "
        "turns.",
        needed / 1e9, ROOM_TO_COMPUTE / 1e9, free / 1e9,
    )  # fmt: skip
    return False


def _load_transformer(unread: _Unread, dtype, device, progress: Progress, sharding: Sharding) -> wan.WanTransformer:
    in_8_bits = quantized_parameters(unread.network)
    load_weights(
        unread.network,
        unread.places,
        dtype_of=lambda name: in_8_bits.get(name) or (torch.float32 if wan.keeps_fp32(name) else dtype),
        device=device,
        share=_share(unread.network, sharding),
        on_bytes=progress.add,
        scales_of=unread.scales_of,
    )
    return unread.network.eval()


def _share(model: wan.WanTransformer, sharding: Sharding) -> Share:
    return Share(sharding, wan.cut_dim, wan.replicated, model.units)
