"""The loaded networks of a rank: built on the meta device from their config, filled from disk, kept until replaced."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Callable

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from . import devices
from .checkpoints.layout import Component, find_component, find_transformer, has_component, read_json
from .checkpoints.keys import to_diffusers_name
from .checkpoints.reader import load_weights
from .families import wan
from .specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec

SMALL = 2**30  # bytes on disk; a text encoder below this is computed in fp32, a larger one in bfloat16


@dataclass
class DiffusionModel:
    """The experts of a model (`low_noise` is None where there is one) and what sampling needs to know of them."""

    high_noise: wan.WanTransformer
    low_noise: wan.WanTransformer | None
    boundary: float
    latents_mean: torch.Tensor  # [1,C,1,1,1], fp32, on the CPU
    latents_std: torch.Tensor
    latent_rgb: torch.Tensor  # [C,3]
    latent_rgb_bias: torch.Tensor  # [3]
    dtype: torch.dtype

    @property
    def experts(self) -> list[wan.WanTransformer]:
        return [expert for expert in (self.high_noise, self.low_noise) if expert is not None]

    def expert_at(self, timestep: float) -> wan.WanTransformer:
        """The expert for a timestep in 0..1000."""
        return self.low_noise if self.is_low_noise(timestep) else self.high_noise

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

    def get(self, spec, on_tensor: Callable[[int, int], None]) -> Any:
        """The component that `spec` describes. `on_tensor` is told of each tensor read; none is, if it is loaded."""
        load, files = _KINDS[type(spec)]
        found = files(spec)
        key = (spec, tuple(component.fingerprint for component in found))
        held = self._slots.get(type(spec))
        if held is None or held[0] != key:
            self._drop(type(spec))  # first, so that never two are held
            self._slots[type(spec)] = held = (key, load(spec, found, self._device, on_tensor))
        return held[1]

    def free(self) -> None:
        for kind in list(self._slots):
            self._drop(kind)

    def _drop(self, kind: type) -> None:
        if self._slots.pop(kind, None) is not None:
            gc.collect()
            devices.empty_cache(self._device)


# Diffusion model


def _transformer_files(spec: DiffusionModelSpec) -> list[Component]:
    found = [find_transformer(spec.path)]
    if spec.low_noise_path is not None:
        found.append(find_transformer(spec.low_noise_path))
    elif has_component(spec.path, "transformer_2"):
        found.append(find_transformer(spec.path, "transformer_2"))
    return found


def _load_diffusion_model(spec: DiffusionModelSpec, found: list[Component], device, on_tensor) -> DiffusionModel:
    dtype = _dtype(spec.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    experts = [_load_transformer(component, dtype, device, on_tensor) for component in found]
    root = found[0].folder.parent
    boundary = spec.boundary
    if boundary is None and (root / "model_index.json").is_file():
        boundary = read_json(root / "model_index.json").get("boundary_ratio")
    return DiffusionModel(
        high_noise=experts[0],
        low_noise=experts[1] if len(experts) > 1 else None,
        boundary=wan.DEFAULT_BOUNDARY if boundary is None else boundary,
        dtype=dtype,
        **_latent_format(root),
    )


def _load_transformer(component: Component, dtype, device, on_tensor) -> wan.WanTransformer:
    model = wan.WanTransformer(component.config)
    load_weights(
        model,
        component.shards,
        dtype_of=lambda name: torch.float32 if any(part in name for part in wan.FP32_PARAMETERS) else dtype,
        device=device,
        rename=to_diffusers_name if component.original_names else lambda name: name,
        on_tensor=on_tensor,
    )
    return model.eval()


def _latent_format(root) -> dict[str, torch.Tensor]:
    """How latents are normalised and pictured: by the VAE beside the model where it says so, else as Wan 2.1's."""
    config = read_json(root / "vae" / "config.json") if has_component(str(root), "vae") else {}
    rgb = read_json(root / "vae" / "latent_rgb.json") if (root / "vae" / "latent_rgb.json").is_file() else {}
    return {
        "latents_mean": _per_channel(config.get("latents_mean", wan.LATENTS_MEAN)),
        "latents_std": _per_channel(config.get("latents_std", wan.LATENTS_STD)),
        "latent_rgb": torch.tensor(rgb.get("factors", wan.LATENT_RGB)),
        "latent_rgb_bias": torch.tensor(rgb.get("bias", wan.LATENT_RGB_BIAS)),
    }


def _per_channel(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)


# Text encoder


def _load_text_encoder(spec: TextEncoderSpec, found: list[Component], device, on_tensor) -> TextEncoder:
    component = found[0]
    dtype = _dtype(spec.dtype, torch.float32 if component.nbytes < SMALL else torch.bfloat16)
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config.from_dict(component.config))
    load_weights(
        model,
        component.shards,
        dtype_of=lambda name: dtype,
        device=torch.device("cpu"),
        optional=("encoder.embed_tokens.weight",),
        on_tensor=on_tensor,
    )
    model.tie_weights()
    tokenizer = component.folder.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise ValueError(f"{tokenizer} does not exist; the text encoder needs the tokenizer folder beside it.")
    return TextEncoder(model.eval(), AutoTokenizer.from_pretrained(tokenizer, local_files_only=True))


# VAE


def _load_vae(spec: VaeSpec, found: list[Component], device, on_tensor):
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(found[0].config)
    dtype = _dtype(spec.dtype, torch.float32)
    load_weights(vae, found[0].shards, dtype_of=lambda name: dtype, device=device, on_tensor=on_tensor)
    return vae.eval()


def _dtype(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)


_KINDS = {
    DiffusionModelSpec: (_load_diffusion_model, _transformer_files),
    TextEncoderSpec: (_load_text_encoder, lambda spec: [find_component(spec.path, "text_encoder")]),
    VaeSpec: (_load_vae, lambda spec: [find_component(spec.path, "vae")]),
}
