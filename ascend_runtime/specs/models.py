"""The models of a job: diffusion model, text encoder, VAE and LoRAs on disk.

A description stands for a loaded thing: whoever holds one can rebuild the thing in a new group of ranks.
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec.structs import replace

from .base import Spec, make_absolute, require_choice, require_range

DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPERTS = ("auto", "resident", "swap")
QUANTIZATIONS = ("none", "w8a8_dynamic")
PLACEMENTS = ("auto", "cpu", "ranks")
LORA_EXPERTS = ("both", "high_noise", "low_noise")
FORMATS = ("diffusers", "mindspeed")  # that a model can be converted to
WEIGHT_DTYPES = ("keep", "bf16", "fp16", "fp32")  # of converted weights; keep: that of each tensor
MAX_STRENGTH = 10.0  # of a LoRA, either way
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # where a word begins within another
_NOISE = re.compile(r"(?<![a-z])(high|low)[-_ ]?noise")
# Alone, it tells where a name ends, or a size, a dtype or a version follows: not in high_res, low_vram, low_steps.
_ALONE = re.compile(r"(?<![a-z])(high|low)(?=(\.\D\w*)?$|[-_. ]?(\d+b|fp\d+|bf16|q\d|int\d|v\d+)(?![a-z]))")


class LoraSpec(Spec, frozen=True, kw_only=True):
    """A LoRA (.safetensors) in a diffusion model's weights.

    strength: factor of what it changes; 0 changes nothing, below 0 it is taken away.
    expert: of two, which one gets it. A model of one expert is "both".
    """

    path: str
    strength: float = 1.0
    expert: str = "both"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path")
        require_range("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)
        require_choice("expert", self.expert, LORA_EXPERTS)


class DiffusionModelSpec(Spec, frozen=True, kw_only=True):
    """A diffusion transformer on disk, with its low-noise expert where the model has two.

    path: a folder or a file, told by what is in it: diffusers' (`transformer/`, and `transformer_2/` as low-noise
        expert), the original's (`high_noise_model/`, `low_noise_model/`), MindSpeed-MM's, or one file, also in 8 bits.
    low_noise_path: the low-noise expert, where it is not found under `path`.
    dtype: of the blocks; "auto" is float32 on a CPU, bfloat16 elsewhere.
    boundary: share of the 1000 training timesteps at and above which the high-noise expert works
        (None: from the checkpoint, else the published model's).
    experts: of two, "resident" keeps both on the device, "swap" one of them, while the other waits in host memory
        (twice the size of one, a rank) and is fetched ahead of its first step. "auto": swap where they do not fit.
    loras: added to the weights in this order; other ones, or other strengths, read no weight of the model again.
    quantization: "w8a8_dynamic" keeps the weights of the blocks' linear layers, but those that narrow the feed-forward,
        in 8 bits, and quantizes what goes in as it comes. "none": as the files are, which may be quantized themselves.
    """

    path: str
    low_noise_path: str | None = None
    dtype: str = "auto"
    boundary: float | None = None
    experts: str = "auto"
    loras: tuple[LoraSpec, ...] = ()
    quantization: str = "none"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path", "low_noise_path")
        if self.low_noise_path is not None:
            require_experts_in_order(self.path, self.low_noise_path)
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("experts", self.experts, EXPERTS)
        require_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.quantization != "none":
            require_no_loras(self.loras, f"quantization is {self.quantization!r}")
        if self.boundary is not None:
            require_range("boundary", self.boundary, 0.0, 1.0)

    def with_lora(self, lora: LoraSpec) -> DiffusionModelSpec:
        """The same with one LoRA more."""
        return replace(self, loras=(*self.loras, lora))


class TextEncoderSpec(Spec, frozen=True, kw_only=True):
    """A UMT5 text encoder and its tokenizer.

    path: a folder or a file, told by what is in it: diffusers' (`text_encoder/`, `tokenizer/`), the original's (a .pth
        and `google/umt5-xxl/` beside it), or one file that brings its tokenizer along, as ComfyUI's do, also in 8 bits.
    dtype: "auto" is float32 on a CPU below 1 GiB on disk, bfloat16 above; on other devices bfloat16, and float32 where
        a card has none.
    placement: "cpu" is rank 0's CPU, all its cores; "ranks" all ranks' devices, the weights shared by FSDP2.
        "auto": what the variable T5_LOAD_CPU asks for on NPUs, else cpu.
    """

    path: str
    dtype: str = "auto"
    placement: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path")
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("placement", self.placement, PLACEMENTS)


class VaeSpec(Spec, frozen=True, kw_only=True):
    """A Wan VAE.

    path: a folder or a file, told by what is in it: diffusers' (`vae/`), the original's (a .pth in it), or one file.
    """

    path: str
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path")
        require_choice("dtype", self.dtype, DTYPES)


def require_no_loras(loras: tuple[LoraSpec, ...], why: str) -> None:
    """Raises ValueError where there are some: what is merged into integers of 8 bits would be rounded away."""
    if loras:
        raise ValueError(
            f"{why}, and weights in 8 bits take no LoRA ({loras[0].path}). Set quantization to 'none' with the model's "
            "bf16, fp16 or fp8_scaled files, or leave the LoRA out."
        )


def require_experts_in_order(high_noise: str, low_noise: str) -> None:
    """Raises ValueError where the names of both files or folders say that each is the other expert: their tensors are
    alike, so nothing else can tell. What both paths begin with says nothing; what can mean another thing neither."""
    paths = [Path(high_noise).parts, Path(low_noise).parts]
    apart = next((place for place, (one, other) in enumerate(zip(*paths)) if one != other), 0)
    if [_expert_named(parts[apart:]) for parts in paths] == ["low", "high"]:
        raise ValueError(
            f"{high_noise} is given as the high-noise expert, and {low_noise} as the low-noise one, but their names "
            "say that it is the other way round. Exchange the two, or rename them if the names are wrong."
        )


def _expert_named(parts: tuple[str, ...]) -> str | None:
    """Which expert a path speaks of, by the last of its parts that speaks of the noise of one alone; else by a word
    that stands alone in the last: "high" or "low"."""
    words = [_HUMP.sub("_", part).lower() for part in reversed(parts)]
    for said in (*map(_NOISE.findall, words), [word for word, *_ in _ALONE.findall(words[0])]):
        if len(set(said)) == 1:
            return said[0]
    return None
