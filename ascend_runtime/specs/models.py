"""Specs of the models of a job: diffusion model, text encoder, VAE and LoRAs on disk.

A spec holds everything that is needed to load its model, so any new group of ranks can load it again.
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec.structs import replace

from ..errors import coded_error
from .base import Spec, make_absolute, require_choice, require_range

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
VAE_DTYPES = (*COMPUTE_DTYPES, "float32_strict")
VAE_TILES = ("auto", "whole", "published")
EXPERT_MODES = ("auto", "resident", "swap")
QUANTIZATIONS = ("none", "w8a8_dynamic")
PLACEMENTS = ("auto", "cpu", "ranks")
LORA_EXPERTS = ("both", "high_noise", "low_noise")
LORA_MISFITS = ("refuse", "skip")
MODEL_FORMATS = ("diffusers", "mindspeed")  # output formats of a conversion
WEIGHT_DTYPES = ("keep", "bf16", "fp16", "fp32")  # of converted weights; "keep" does not change a tensor's dtype
MAX_STRENGTH = 100.0  # of a LoRA, positive or negative; core ComfyUI's loaders have the same limit
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # a word boundary in camel case
_NOISE = re.compile(r"(?<![a-z])(high|low)[-_ ]?noise")
# "high" or "low" without "noise" counts at the end of a name, or before a size, dtype or version (not in high_res).
_BARE = re.compile(r"(?<![a-z])(high|low)(?=(\.\D\w*)?$|[-_. ]?(\d+b|fp\d+|bf16|q\d|int\d|v\d+)(?![a-z]))")


class LoraSpec(Spec, frozen=True, kw_only=True):
    """A LoRA (.safetensors) in a diffusion model's weights.

    strength: the scale of the LoRA's update; 0 has no effect, and a negative value subtracts it.
    expert: the expert that gets it, if the model has two. For a model with one expert, use "both".
    misfits: what to do about layers whose shapes do not fit: "refuse" the job, or "skip" them with a warning.
    """

    path: str
    strength: float = 1.0
    expert: str = "both"
    misfits: str = "refuse"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path")
        require_range("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)
        require_choice("expert", self.expert, LORA_EXPERTS)
        require_choice("misfits", self.misfits, LORA_MISFITS)


class DiffusionModelSpec(Spec, frozen=True, kw_only=True):
    """A diffusion transformer on disk, and its low-noise expert if the model has two.

    path: a folder or a file; its format is detected: diffusers' (`transformer/`, and `transformer_2/` as low-noise
        expert), the original's (`high_noise_model/`, `low_noise_model/`), MindSpeed-MM's, or one file, also in 8 bits.
    low_noise_path: the low-noise expert, if it is not under `path`.
    dtype: of the blocks; "auto" is float32 on a CPU, bfloat16 on other devices.
    boundary: the fraction of the 1000 training timesteps at and above which the high-noise expert is used
        (None: the checkpoint's, else the published model's).
    experts: for a model with two. "resident" keeps both on the device. "swap" keeps one there and both in pinned
        host memory (twice an expert's size per rank), and copies the other ahead of its first step. "auto" swaps if
        they do not fit, without fsdp. If the host has too little memory for all its ranks, loading is refused before
        a weight is read.
    loras: merged into the weights in this order, or added to the outputs of quantized layers; changing them, or a
        strength, does not reload the model's weights.
    quantization: "w8a8_dynamic" stores the weights of the blocks' linear layers, except the feed-forward's second, in
        8 bits, and quantizes activations dynamically. "none" leaves weights as the files have them, also if quantized.
    packed: of GGUF files: whether the weights of linear layers stay in the file's few bits, and each is dequantized
        when it is used, which takes less memory and a little time in each step; else all are dequantized when they are
        read. None: they stay so if the device has too little memory otherwise. Of ComfyUI's and LightX2V's integers and
        mxfp8: False dequantizes them when they are read; else they are computed as such where the device can.
    """

    path: str
    low_noise_path: str | None = None
    dtype: str = "auto"
    boundary: float | None = None
    experts: str = "auto"
    loras: tuple[LoraSpec, ...] = ()
    quantization: str = "none"
    packed: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path", "low_noise_path")
        if self.low_noise_path is not None:
            require_experts_in_order(self.path, self.low_noise_path)
        require_choice("dtype", self.dtype, COMPUTE_DTYPES)
        require_choice("experts", self.experts, EXPERT_MODES)
        require_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.packed and self.quantization != "none":
            raise ValueError(
                f"packed keeps weights as a GGUF file has them, and quantization is {self.quantization!r}. Set one of "
                "the two."
            )
        if self.boundary is not None:
            require_range("boundary", self.boundary, 0.0, 1.0)

    def with_lora(self, lora: LoraSpec) -> DiffusionModelSpec:
        """A copy with one more LoRA."""
        return replace(self, loras=(*self.loras, lora))


class TextEncoderSpec(Spec, frozen=True, kw_only=True):
    """The text encoders of a model and their tokenizers.

    path: a folder or a file; its format is detected: diffusers' (`text_encoder/`, `tokenizer/`), the original's (a .pth
        next to `google/umt5-xxl/`, or folders that contain their tokenizers), or ComfyUI's file, which may contain its
        tokenizer, also in 8 bits.
    path_2: the second encoder's folder or file, for a model with two that are not both in `path`. Their content shows
        which is which, so their order does not matter.
    vision_path: the folder or file of the vision tower, for prompts with an image (None: it is in `path`).
    tokenizer_path, tokenizer_path_2: folders with the tokenizers of the main encoder and of the second one. They are
        used if there is no tokenizer in the encoder's files or next to them.
    dtype: "auto" is bfloat16. On a CPU it is float32 if the encoder takes less than 1 GiB on disk, or the CPU has no
        instructions for bfloat16; if memory does not suffice for that, bfloat16 with a warning.
    placement: "cpu" runs on rank 0's CPU with all its cores; "ranks" on all ranks' devices, sharded by FSDP2.
        "auto": set by the environment variable T5_LOAD_CPU on NPUs; else where a prompt is encoded sooner, of the
        places that have room: cpu if the devices are CPUs, or NPUs whose ranks were not started for weights that are
        sharded.
    """

    path: str
    path_2: str | None = None
    vision_path: str | None = None
    tokenizer_path: str | None = None
    tokenizer_path_2: str | None = None
    dtype: str = "auto"
    placement: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path", "path_2", "vision_path", "tokenizer_path", "tokenizer_path_2")
        require_choice("dtype", self.dtype, COMPUTE_DTYPES)
        require_choice("placement", self.placement, PLACEMENTS)

    @property
    def vision(self) -> VisionSpec:
        """The vision tower that reads the images of prompts."""
        return VisionSpec(path=self.vision_path or self.path, dtype=self.dtype, placement=self.placement)


class VisionSpec(Spec, frozen=True, kw_only=True):
    """The vision tower that reads the images of prompts; see TextEncoderSpec."""

    path: str
    dtype: str = "auto"
    placement: str = "auto"


class VaeSpec(Spec, frozen=True, kw_only=True):
    """A VAE.

    path: a folder or a file; its format is detected: diffusers' (`vae/`), the original's folder (with a .pth), or one
        file.
    dtype: "auto" is bfloat16 on NPUs, float32 on other devices. In "float32", an NPU's convolutions round their inputs
        to HF32 and CUDA's to TF32, both with 10 of float32's 23 bits of mantissa, as torch_npu and torch do by default.
        "float32_strict" rounds nothing; A2 and A3 cards have no such convolution. On a CPU the two are the same.
    tiles: "whole" computes the frames as one plane, without seams, each rank a part of it. "published" computes tiles
        that overlap and are blended, as the model's authors do (HunyuanVideo, on any number of ranks), or as diffusers
        does (Wan, on one rank). "auto" is "whole" if it fits in memory. A loaded VAE serves all of them.
    """

    path: str
    dtype: str = "auto"
    tiles: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        make_absolute(self, "path")
        require_choice("dtype", self.dtype, VAE_DTYPES)
        require_choice("tiles", self.tiles, VAE_TILES)

    @property
    def strict(self) -> bool:
        return self.dtype == "float32_strict"


def require_experts_in_order(high_noise: str, low_noise: str) -> None:
    """Raises ValueError if the names of both files or folders say that they are swapped. Only names can show this, as
    the experts' tensors have the same shapes. The common prefix of the paths and ambiguous words are ignored."""
    paths = [Path(high_noise).parts, Path(low_noise).parts]
    apart = next((place for place, (one, other) in enumerate(zip(*paths)) if one != other), 0)
    if [_expert_named(parts[apart:]) for parts in paths] == ["low", "high"]:
        raise coded_error(
            "AV-1403",
            f"{high_noise} is given as the high-noise expert, and {low_noise} as the low-noise expert, but by their "
            "names they are swapped. Exchange the two, or rename them if the names are wrong.",
        )


def _expert_named(parts: tuple[str, ...]) -> str | None:
    """The expert that a path names, "high" or "low": by the last part that mentions the noise of only one expert, else
    by a bare "high" or "low" in the last part."""
    words = [_HUMP.sub("_", part).lower() for part in reversed(parts)]
    for found in (*map(_NOISE.findall, words), [word for word, *_ in _BARE.findall(words[0])]):
        if len(set(found)) == 1:
            return found[0]
    return None
