"""The loaded networks of a rank: built on the meta device from their config, filled from disk, kept until replaced."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Hashable

import torch
from diffusers import AutoencoderKLWan
from msgspec.structs import replace
from torch import nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from . import devices
from .accelerate.quantized import WAYS, linears, quantize, quantized_parameters
from .checkpoints.configs import LATENTS_MEAN_22, LATENTS_STD_22
from .checkpoints.faults import usable
from .checkpoints.layout import Component, find_text_encoder, find_transformer, find_vae, has_low_noise, read_json
from .checkpoints.reader import Places, Progress, check_weights, load_weights, nbytes, tokenizer_model
from .experts import HIGH_NOISE, LOW_NOISE, ExpertSwap
from .families import wan, wan_vae
from .families.defaults import WAN22_TEXT, Defaults, defaults_of
from .loras import Adapter, LorasInUse, by_expert, changed_by, read_loras, use_loras
from .ops import check_quantized
from .parallel.fsdp import Share, Sharding
from .specs import (
    DiffusionModelSpec, SampleSpec, TextEncoderSpec, VaeSpec, require_experts_in_order, require_no_loras,
)  # fmt: skip
from .text import SentencePiece

logger = logging.getLogger(__name__)

ROOM_TO_COMPUTE = 8 * 2**30  # bytes that must stay free beside two experts: a 14B block at 1280 x 720 x 81 on one card
SPIECE = "spiece.model"  # a sentencepiece model in a tokenizer's folder
SMALL = 2**30  # bytes on disk; on a CPU a text encoder below this is computed in fp32, a larger one in bfloat16


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


@dataclass
class TextEncoder:
    model: torch.nn.Module
    tokenizer: Any


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
            network = _as_described(wan.WanTransformer(component.config, sharding.tp), component)
        places = check_weights(network, component.shards, component.rename, component.quantized)
        layers = [] if quantization == "none" else linears(network, wan.kept_in_8_bits)
        quantize(network, {name: WAYS[quantization] for name in layers})
        return cls(network, places, {f"{name}.weight": f"{name}.weight_scale" for name in layers})


class Components:
    """One slot a kind: a described component is loaded when first asked for, and kept until another takes its place,
    its files change on disk, or all are freed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._slots: dict[type, tuple[Any, Any]] = {}

    def get(self, spec, on_bytes: Callable[[int, int], None], sharding: Sharding = Sharding()) -> Any:
        """The component that `spec` describes. LoRAs are no part of what is loaded: they change it.

        on_bytes: told how many bytes are done, and how many there are, after each tensor that is read, or that changes
            for LoRAs: of whole tensors on disk, of all networks. Not called where nothing is to be done.
        sharding: how the weights of a diffusion model or a text encoder are spread over the ranks; a VAE is whole.

        Nothing is allocated before the names and shapes of all networks, and of LoRAs, are known to fit. Raises
        ValueError where they do not, or a file changes meanwhile.
        """
        progress = Progress(on_bytes)
        component = self._held(spec, progress, sharding)
        if isinstance(spec, DiffusionModelSpec):
            use_loras(component.adapters, spec.loras, progress)
            self._make_room()
        if isinstance(spec, VaeSpec):
            nn.Module.to(component, self._device)  # it may have been moved away
        return component

    def _held(self, spec, progress: Progress, sharding: Sharding) -> Any:
        load, files = _KINDS[type(spec)]
        found = files(spec)
        base = replace(spec, loras=()) if isinstance(spec, DiffusionModelSpec) else spec
        key = (base, sharding, _state(found))
        held = self._slots.get(type(spec))
        if held is None or held[0] != key:
            self.drop(type(spec))  # first, so that never two are held
            self._slots[type(spec)] = held = (key, load(spec, found, self._device, progress, sharding))
            if self.state(spec) != key[-1]:
                self.drop(type(spec))
                raise ValueError(f"{spec.path} changed while it was read. Run again.")
        return held[1]

    def _make_room(self) -> None:
        """Moves a VAE to the host where it leaves a card too little to compute in beside a diffusion model; no file is
        read when it is wanted again."""
        if VaeSpec not in self._slots or self._slots[VaeSpec][1].device.type == "cpu":
            return
        room = devices.room(self._device)
        if room < ROOM_TO_COMPUTE:
            logger.info("%.1f GB are free to sample in: the VAE waits in the host's memory.", room / 1e9)
            nn.Module.to(self._slots[VaeSpec][1], "cpu")
            devices.empty_cache(self._device)

    def state(self, spec) -> Hashable:
        """Changes when a file does that makes the component that `spec` describes what it is. Loads nothing."""
        return _state(_KINDS[type(spec)][1](spec))

    def free(self) -> None:
        for kind in list(self._slots):
            self.drop(kind)

    def drop(self, kind: type) -> None:
        """Frees what a description of this kind stands for, if it is held."""
        if self._slots.pop(kind, None) is not None:
            gc.collect()
            devices.empty_cache(self._device)


def _state(found: list[Component]) -> Hashable:
    return tuple(component.fingerprint for component in found)


# Diffusion model


def _transformer_files(spec: DiffusionModelSpec) -> list[Component]:
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


def _load_diffusion_model(
    spec: DiffusionModelSpec, found: list[Component], device, progress: Progress, sharding: Sharding
) -> DiffusionModel:
    dtype = _dtype(spec.dtype, devices.default_dtype(device))
    if spec.quantization != "none" or any(component.quantized for component in found):
        check_quantized(device, dtype)
    latent_format = check_experts(found)
    defaults = defaults_of(found[0].config, experts=len(found))
    boundary = _boundary(spec, found[0], defaults)
    unread = {
        expert: _Unread.of(component, sharding, spec.quantization)
        for expert, component in zip((HIGH_NOISE, LOW_NOISE), found)
    }
    can_swap = _can_swap(spec, [one.network for one in unread.values()], sharding)
    asked = by_expert(spec.loras, list(unread))
    loras = {expert: read_loras(asked[expert], one.places) for expert, one in unread.items()}
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
            expert: _adapter(expert, networks[expert], one.places, loras[expert], swap, device, sharding)
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
    expert: str, network, places: Places, loras: LorasInUse, swap: ExpertSwap | None, device, sharding: Sharding
) -> Adapter:
    """What changes the weights of an expert, where they are kept."""
    share, files = _share(network, sharding), [file for file, _ in loras]
    if swap is None:
        return Adapter(places, network.get_parameter, share, device, files)
    return Adapter(places, swap.on_host(expert).__getitem__, share, device, files, swap.outdate)


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


def check_experts(found: list[Component]) -> dict[str, torch.Tensor]:
    """The latent format of a model's expert, or two in this order. Raises ValueError where they are not of a model that
    can be used."""
    latent_format = _latent_format(found[0])
    for component in found:
        _check_channels(component, found[0], latent_format["latents_mean"].shape[1])
    if len(found) == 2:
        require_experts_in_order(*(str(component.shards[0]) for component in found))
    return latent_format


def _check_channels(component: Component, first: Component, channels: int) -> None:
    """Raises ValueError for a transformer that does not make latents of this format, from text or from an image."""
    config, where = component.config, component.shards[0]
    inputs, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
    image_to_video = 2 * outputs + wan.MASK_CHANNELS
    if inputs not in (outputs, image_to_video):
        raise ValueError(
            f"{where} reads {inputs} channels and makes {outputs}. It must read {outputs}, as a text-to-video model, "
            f"or {image_to_video}, as an image-to-video model; other kinds (control, camera, VACE) cannot be used."
        )
    if outputs != channels:
        raise ValueError(
            f"{where} makes latents of {outputs} channels, but its latent format has {channels}. Take the whole "
            "diffusers folder of the model, whose vae/config.json has the format."
        )
    for key, default in (("text_dim", 4096), ("in_channels", 16), ("image_dim", None)):
        ours, theirs = config.get(key, default), first.config.get(key, default)
        if ours != theirs:
            raise ValueError(
                f"{where} has {key} {ours}, {first.shards[0]} {theirs}. Take both experts of one model."
            )


def _boundary(spec: DiffusionModelSpec, component: Component, defaults: Defaults) -> float:
    boundary = own_boundary(component) if spec.boundary is None else spec.boundary
    return (defaults.boundary or WAN22_TEXT.boundary) if boundary is None else boundary


def own_boundary(component: Component) -> float | None:
    """What a model's folder says of it, if it does. Raises ValueError where that is no number from 0 to 1."""
    index = component.root and component.root / "model_index.json"
    boundary = read_json(index).get("boundary_ratio") if index and index.is_file() else None
    if boundary is not None and (type(boundary) not in (int, float) or not 0 <= boundary <= 1):
        raise ValueError(
            f"{index} has the boundary_ratio {boundary!r}; it must be a number from 0 to 1, such as "
            f"{WAN22_TEXT.boundary}. Correct it, or download the file again."
        )
    return boundary


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


def _latent_format(component: Component) -> dict[str, torch.Tensor]:
    """How latents are normalised and pictured: by the VAE beside the model where it says so, else as of the published
    VAE with as many channels."""
    vae = component.root and component.root / "vae"
    config = read_json(vae / "config.json") if vae and (vae / "config.json").is_file() else {}
    rgb = read_json(vae / "latent_rgb.json") if vae and (vae / "latent_rgb.json").is_file() else {}
    known, said_by = (wan.LATENTS_MEAN, wan.LATENTS_STD), vae or component.shards[0]
    if component.config.get("out_channels", 16) == len(LATENTS_MEAN_22):
        known = (LATENTS_MEAN_22, LATENTS_STD_22)
    with usable(said_by, "its latents_mean and latents_std"):
        mean, std = (torch.tensor(config.get(key, own), dtype=torch.float32)
                     for key, own in zip(("latents_mean", "latents_std"), known))  # fmt: skip
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"they are of the shapes {list(mean.shape)} and {list(std.shape)}")
        mean, std = mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
    with usable(said_by, "its table of colours"):
        table = wan.LATENT_RGB.get(mean.numel(), {}) | rgb
        factors, bias = (torch.tensor(table.get(key, own), dtype=torch.float32)
                         for key, own in (("factors", ()), ("bias", (0.0, 0.0, 0.0))))  # fmt: skip
        channels = len(factors)
    if channels != mean.numel():
        logger.warning("No RGB table is known for latents of %d channels: there will be no previews.", mean.numel())
        factors = None
    return {"latents_mean": mean, "latents_std": std, "latent_rgb": factors, "latent_rgb_bias": bias}


# Text encoder


def _load_text_encoder(
    spec: TextEncoderSpec, found: list[Component], device, progress: Progress, sharding: Sharding
) -> TextEncoder:
    """On this rank's device, whole or a share, where its placement is ranks; else whole on the CPU."""
    component = found[0]
    tokenizer = _tokenizer(component)  # before the weights are read, as it can be missing
    device = device if spec.placement == "ranks" else torch.device("cpu")
    dtype = _dtype(spec.dtype, _text_dtype(device, component.nbytes))
    model = empty_network("text_encoder", component)
    places = check_weights(model, component.shards, component.rename)
    progress.expect(nbytes(places))
    load_weights(
        model,
        places,
        dtype_of=lambda name: dtype,
        device=device,
        share=Share(sharding, lambda name: None, lambda name: False, [model.shared, *model.encoder.block]),
        on_bytes=progress.add,
    )
    return TextEncoder(model.eval(), tokenizer)


def _tokenizer(component: Component) -> Any:
    """The tokenizer of a text encoder: a folder's, or the one that its file brings along."""
    found = component.tokenizer
    if found is None:
        raise ValueError(
            f"{component.shards[0]} has no tokenizer in it, and none lies beside it. Put the folder google/umt5-xxl of "
            "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) beside the file, or take ComfyUI's "
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors (Comfy-Org/Wan_2.1_ComfyUI_repackaged), which has one."
        )
    if found.is_file():
        model = tokenizer_model(found)
        with usable(found, "its tokenizer"):
            return SentencePiece(model)
    if not found.is_dir():
        raise ValueError(f"{found} does not exist; the text encoder needs the tokenizer folder beside it.")
    with usable(found, "the tokenizer in it"):
        if (found / SPIECE).is_file() and not (found / "tokenizer.json").is_file():  # transformers would want protobuf
            return SentencePiece((found / SPIECE).read_bytes())
        return AutoTokenizer.from_pretrained(found, local_files_only=True)


def _text_dtype(device: torch.device, nbytes: int) -> torch.dtype:
    """What an encoder of this size on disk computes in, where it is not told."""
    if device.type == "cpu":
        return torch.float32 if nbytes < SMALL else torch.bfloat16
    dtype = devices.default_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype  # T5's feed-forward overflows in float16


# VAE


def _load_vae(spec: VaeSpec, found: list[Component], device, progress: Progress, _):
    vae = empty_network("vae", found[0])
    places = check_weights(vae, found[0].shards, found[0].rename)
    progress.expect(nbytes(places))
    dtype = _dtype(spec.dtype, torch.float32)
    load_weights(vae, places, dtype_of=lambda name: dtype, device=device, on_bytes=progress.add)
    return wan_vae.streamed(vae.eval())


def check(kind: str, component: Component) -> None:
    """Raises ValueError for a "transformer", "text_encoder" or "vae" which, whatever is beside it, cannot be loaded. No
    weight is read."""
    if kind == "text_encoder":
        _tokenizer(component)
    if kind == "transformer":
        own_boundary(component)
    check_weights(empty_network(kind, component), component.shards, component.rename, component.quantized)


def empty_network(kind: str, component: Component) -> torch.nn.Module:
    """The network of a "transformer", "text_encoder" or "vae", on the meta device. Raises ValueError where there is
    none of this config."""
    told_by = component.folder / "config.json" if component.folder else component.shards[0]
    with usable(told_by, f"its config of a {kind}"):
        network = _network(kind, component.config)
    return _as_described(network, component)


def _network(kind: str, config: dict) -> torch.nn.Module:
    if kind == "transformer":
        return wan.WanTransformer(config)
    with torch.device("meta"):
        if kind == "vae":
            return AutoencoderKLWan.from_config(config)
        model = UMT5EncoderModel(UMT5Config.from_dict(config))
        model.set_input_embeddings(model.shared)  # one module twice: FSDP2 gathers a module's own parameters
        return model


def _as_described(network: nn.Module, component: Component) -> nn.Module:
    """`network`, with quantized layers where the component's description says so."""
    if component.quantized is not None:
        quantize(network, component.quantized.renamed(lambda name: component.rename(name, component.shards[0])))
    return network


def _dtype(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)


_KINDS = {
    DiffusionModelSpec: (_load_diffusion_model, _transformer_files),
    TextEncoderSpec: (_load_text_encoder, lambda spec: [find_text_encoder(spec.path)]),
    VaeSpec: (_load_vae, lambda spec: [find_vae(spec.path)]),
}
