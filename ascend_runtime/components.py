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
from .checkpoints.configs import LATENTS_MEAN_22, LATENTS_STD_22
from .checkpoints.layout import Component, find_text_encoder, find_transformer, find_vae, has_low_noise, read_json
from .checkpoints.lora import fingerprint
from .checkpoints.reader import load_weights, tokenizer_model
from .experts import HIGH_NOISE, LOW_NOISE, ExpertSwap
from .families import wan, wan_vae
from .families.defaults import WAN22_TEXT, Defaults, defaults_of
from .loras import Adapter, use_loras
from .parallel.fsdp import Share, Sharding
from .specs import DiffusionModelSpec, SampleSpec, TextEncoderSpec, VaeSpec, require_experts_in_order
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
        low_noise = self.is_low_noise(timestep)
        if self.swap is not None:
            self.swap.use(LOW_NOISE if low_noise else HIGH_NOISE)
        return self.low_noise if low_noise else self.high_noise

    def expect(self, timestep: float | None) -> None:
        """Has the next pass fetch the expert of the timestep after it; None is another video's first."""
        if self.swap is not None:
            low_noise = timestep is not None and self.is_low_noise(timestep)
            self.swap.fetch_ahead(LOW_NOISE if low_noise else HIGH_NOISE)

    def guided(self, spec: SampleSpec) -> bool:
        """Whether any step needs the uncond branch."""
        return spec.guidance_scale != 1.0 or (self.low_noise is not None and spec.low_noise_guidance != 1.0)

    def is_low_noise(self, timestep: float) -> bool:
        return self.low_noise is not None and timestep < self.boundary * 1000


@dataclass
class TextEncoder:
    model: torch.nn.Module
    tokenizer: Any


class Components:
    """One slot a kind: a described component is loaded when first asked for, and kept until another takes its place,
    its files change on disk, or all are freed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._slots: dict[type, tuple[Any, Any]] = {}

    def get(self, spec, on_tensor: Callable[[int, int], None], sharding: Sharding = Sharding()) -> Any:
        """The component that `spec` describes. `on_tensor` is told of each tensor read; none is, if it is loaded. LoRAs
        are no part of what is loaded: it is told of each tensor that must change for them.

        sharding: how the weights of a diffusion model or a text encoder are spread over the ranks; a VAE is whole.
        """
        if isinstance(spec, VaeSpec):
            return nn.Module.to(self._held(spec, on_tensor, sharding), self._device)  # it may have been moved away
        if not isinstance(spec, DiffusionModelSpec):
            return self._held(spec, on_tensor, sharding)
        for lora in spec.loras:
            fingerprint(lora.path)  # before gigabytes are read: is it there?
        model = self._held(replace(spec, loras=()), on_tensor, sharding)
        use_loras(model.adapters, spec.loras, on_tensor)
        self._make_room()
        return model

    def _held(self, spec, on_tensor: Callable[[int, int], None], sharding: Sharding) -> Any:
        load, files = _KINDS[type(spec)]
        found = files(spec)
        key = (spec, sharding, _state(found))
        held = self._slots.get(type(spec))
        if held is None or held[0] != key:
            self.drop(type(spec))  # first, so that never two are held
            self._slots[type(spec)] = held = (key, load(spec, found, self._device, on_tensor, sharding))
        return held[1]

    def _make_room(self) -> None:
        """Moves a VAE to the host where it leaves a card too little to compute in beside a diffusion model; no file is
        read when it is wanted again."""
        if VaeSpec not in self._slots or self._device.type == "cpu":
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
    if len(found) == 2:
        require_experts_in_order(*(str(component.shards[0]) for component in found))
    return found


def _load_diffusion_model(
    spec: DiffusionModelSpec, found: list[Component], device, on_tensor, sharding: Sharding
) -> DiffusionModel:
    dtype = _dtype(spec.dtype, devices.default_dtype(device))
    latent_format = _latent_format(found[0])
    for component in found:
        _check_channels(component, found[0], latent_format["latents_mean"].shape[1])
    high_noise = _load_transformer(found[0], dtype, device, on_tensor, sharding)
    low_noise, swap = None, None
    if len(found) > 1 and _must_swap(spec, found[1], high_noise, device, sharding):
        idle = _load_transformer(found[1], dtype, torch.device("cpu"), on_tensor, sharding)
        swap = ExpertSwap(high_noise, high_noise.units, dict(idle.named_parameters()), device)
        low_noise = high_noise
    elif len(found) > 1:
        low_noise = _load_transformer(found[1], dtype, device, on_tensor, sharding)
    defaults = defaults_of(found[0].config, experts=len(found))
    return DiffusionModel(
        adapters=_adapters(high_noise, low_noise, swap, device, sharding),
        high_noise=high_noise,
        low_noise=low_noise,
        defaults=defaults,
        boundary=_boundary(spec, found[0], defaults),
        dtype=dtype,
        swap=swap,
        **latent_format,
    )


def _adapters(high_noise, low_noise, swap: ExpertSwap | None, device, sharding: Sharding) -> dict[str, Adapter]:
    """What changes the weights of each expert, where they are kept."""
    adapters = {}
    for expert, network in ((HIGH_NOISE, high_noise), (LOW_NOISE, low_noise)):
        if network is not None:
            names = [name for name, _ in network.named_parameters()]
            share = _share(network, sharding)
            if swap is None:
                adapters[expert] = Adapter(names, network.get_parameter, share, device)
            else:
                adapters[expert] = Adapter(names, swap.on_host(expert).__getitem__, share, device, swap.outdate)
    return adapters


def _must_swap(
    spec: DiffusionModelSpec, component: Component, loaded: wan.WanTransformer, device, sharding: Sharding
) -> bool:
    """Whether the second expert is to take turns with the one that is loaded. Ranks may decide differently: the
    video is the same."""
    if spec.experts == "resident":
        return False
    if spec.experts == "auto" and (sharding.mesh is not None or _fits(loaded, device)):
        return False
    same = dict(loaded.config) == dict(wan.WanTransformer(component.config, sharding.tp).config)
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
    boundary = spec.boundary
    if boundary is None and component.root and (component.root / "model_index.json").is_file():
        boundary = read_json(component.root / "model_index.json").get("boundary_ratio")
    return (defaults.boundary or WAN22_TEXT.boundary) if boundary is None else boundary


def _load_transformer(component: Component, dtype, device, on_tensor, sharding: Sharding) -> wan.WanTransformer:
    model = wan.WanTransformer(component.config, sharding.tp)
    load_weights(
        model,
        component.shards,
        dtype_of=lambda name: torch.float32 if wan.keeps_fp32(name) else dtype,
        device=device,
        rename=component.rename,
        share=_share(model, sharding),
        on_tensor=on_tensor,
    )
    return model.eval()


def _share(model: wan.WanTransformer, sharding: Sharding) -> Share:
    return Share(sharding, wan.cut_dim, wan.replicated, model.units)


def _latent_format(component: Component) -> dict[str, torch.Tensor]:
    """How latents are normalised and pictured: by the VAE beside the model where it says so, else as of the published
    VAE with as many channels."""
    vae = component.root and component.root / "vae"
    config = read_json(vae / "config.json") if vae and (vae / "config.json").is_file() else {}
    rgb = read_json(vae / "latent_rgb.json") if vae and (vae / "latent_rgb.json").is_file() else {}
    known = (wan.LATENTS_MEAN, wan.LATENTS_STD)
    if component.config.get("out_channels", 16) == len(LATENTS_MEAN_22):
        known = (LATENTS_MEAN_22, LATENTS_STD_22)
    mean = config.get("latents_mean", known[0])
    table = wan.LATENT_RGB.get(len(mean), {}) | rgb
    factors = table.get("factors", ())
    if len(factors) != len(mean):
        logger.warning("No RGB table is known for latents of %d channels: there will be no previews.", len(mean))
    return {
        "latents_mean": _per_channel(mean),
        "latents_std": _per_channel(config.get("latents_std", known[1])),
        "latent_rgb": torch.tensor(factors) if len(factors) == len(mean) else None,
        "latent_rgb_bias": torch.tensor(table.get("bias", (0.0, 0.0, 0.0))),
    }


def _per_channel(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)


# Text encoder


def _load_text_encoder(
    spec: TextEncoderSpec, found: list[Component], device, on_tensor, sharding: Sharding
) -> TextEncoder:
    """On this rank's device, whole or a share, where its placement is ranks; else whole on the CPU."""
    component = found[0]
    tokenizer = _tokenizer(component)  # before the weights are read, as it can be missing
    device = device if spec.placement == "ranks" else torch.device("cpu")
    dtype = _dtype(spec.dtype, _text_dtype(device, component.nbytes))
    model = empty_network("text_encoder", component)
    load_weights(
        model,
        component.shards,
        dtype_of=lambda name: dtype,
        device=device,
        rename=component.rename,
        share=Share(sharding, lambda name: None, lambda name: False, [model.shared, *model.encoder.block]),
        on_tensor=on_tensor,
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
        return SentencePiece(tokenizer_model(found))
    if not found.is_dir():
        raise ValueError(f"{found} does not exist; the text encoder needs the tokenizer folder beside it.")
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


def _load_vae(spec: VaeSpec, found: list[Component], device, on_tensor, _):
    vae = empty_network("vae", found[0])
    dtype = _dtype(spec.dtype, torch.float32)
    load_weights(
        vae,
        found[0].shards,
        dtype_of=lambda name: dtype,
        device=device,
        rename=found[0].rename,
        on_tensor=on_tensor,
    )
    return wan_vae.streamed(vae.eval())


def empty_network(kind: str, component: Component) -> torch.nn.Module:
    """The network of a "transformer", "text_encoder" or "vae", on the meta device."""
    with torch.device("meta"):
        if kind == "vae":
            return AutoencoderKLWan.from_config(component.config)
        if kind == "text_encoder":
            model = UMT5EncoderModel(UMT5Config.from_dict(component.config))
            model.set_input_embeddings(model.shared)  # one module twice: FSDP2 gathers a module's own parameters
            return model
    return wan.WanTransformer(component.config)


def _dtype(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)


_KINDS = {
    DiffusionModelSpec: (_load_diffusion_model, _transformer_files),
    TextEncoderSpec: (_load_text_encoder, lambda spec: [find_text_encoder(spec.path)]),
    VaeSpec: (_load_vae, lambda spec: [find_vae(spec.path)]),
}
