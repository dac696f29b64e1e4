"""What a job is made of: frozen descriptions, validated when they are made, free of torch.

A description stands for a loaded thing: whoever holds one can rebuild the thing in a new group of ranks.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from msgspec.structs import force_setattr, replace

from .description import Spec
from .plans import AXES, Plan, choose, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")
SOLVERS = ("unipc", "euler", "dpm++")
SCHEDULES = ("wan", "simple")
ATTENTIONS = ("auto", "fused", "laser", "infer", "fastest", "fp8", "plain")
LAYER_NORMS = ("auto", "fused", "fp32")
RING_EXCHANGES = ("rotate", "gather")
EXPERTS = ("auto", "resident", "swap")
QUANTIZATIONS = ("none", "w8a8_dynamic")
PLACEMENTS = ("auto", "cpu", "ranks")
LORA_EXPERTS = ("both", "high_noise", "low_noise")
FORMATS = ("diffusers", "mindspeed")  # that a model can be converted to
WEIGHT_DTYPES = ("keep", "bf16", "fp16", "fp32")  # of converted weights; keep: that of each tensor
MAX_STRENGTH = 10.0  # of a LoRA, either way
MAX_SEED = 2**64 - 1
MAX_PATH = 4096  # characters (limits.h)
MAX_RANKS = 1024
MAX_SIDE = 16384  # pixels: 1024 positions of 2 x 2 latents of 8 x 8, which is how many a published network knows
MAX_FRAMES = 4093  # 1024 positions of a latent frame
MAX_PIXELS = 2**33  # of all frames, so that a size out of a file cannot ask for more memory than a machine has
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # where a word begins within another
_NOISE = re.compile(r"(?<![a-z])(high|low)[-_ ]?noise")
# Alone, it tells where a name ends, or a size, a dtype or a version follows: not in high_res, low_vram, low_steps.
_ALONE = re.compile(r"(?<![a-z])(high|low)(?=(\.\D\w*)?$|[-_. ]?(\d+b|fp\d+|bf16|q\d|int\d|v\d+)(?![a-z]))")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it can be one of {', '.join(choices)}.")


def _make_absolute(spec: Spec, *names: str) -> None:
    """Ranks work in another folder than their client: a path must mean the same in both, and be one in both."""
    for name in names:
        path = getattr(spec, name)
        if path is not None:
            if not 0 < len(path) <= MAX_PATH or "\0" in path:
                shown = repr(path) if len(path) <= MAX_PATH else f"of {len(path)} characters"
                raise ValueError(f"{name} is {shown}, which is the path of no file. Give the path of one.")
            if any("\ud800" <= character <= "\udfff" for character in path):
                raise ValueError(f"{name} is {path!r}, whose name is no text in UTF-8. Rename the file or folder.")
            force_setattr(spec, name, os.path.abspath(os.path.expanduser(path)))


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


def _require_multiple(name: str, value: int, step: int, offset: int, highest: int) -> None:
    """Raises ValueError, with the nearest that can be, where `value` is not n * step + offset, from the first of these
    above 0 up to `highest`."""
    lowest = offset or step
    if value % step == offset and lowest <= value <= highest:
        return
    down = min(max(lowest, (value - offset) // step * step + offset), highest)
    near = f"The nearest are {down} and {down + step}." if down < highest else f"The nearest is {down}."
    what = f"{step}n+{offset}" if offset else f"a multiple of {step}"
    raise ValueError(f"{name} is {value}; it must be {what}, from {lowest} to {highest}. {near}")


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")


class ParallelSpec(Spec, frozen=True, kw_only=True):
    """How many ranks there are and how they share one video; 0 leaves the choice to the runtime.

    ranks: processes, one a device. 0: as many as visible devices, one on a CPU.
    cfg_degree: 2 computes the cond and the uncond branch on different ranks, 1 one after the other.
    ring_degree: parts of the sequence whose keys and values travel from rank to rank.
    ulysses_degree: chunks of such a part, exchanged for heads around each attention.
    tp_degree: slices of the weights of each layer. Never chosen by the runtime, as it exchanges the most: 1 is none.
    fsdp: of the weights, or of this slice of them, each rank keeps a share, and gathers a block's when its turn comes.
        Ranks that have nobody to share with keep all.
    ring_exchange: "rotate" or "gather" (see parallel/ring.py). overlap: Ulysses' exchange travels while attention
        computes (None: what the variable OVERLAP asks for on NPUs, else not).
    With given ranks, given degrees must make them. With automatic ranks the degrees are a wish: what was made for
    eight cards runs on fewer.
    """

    ranks: int = 0
    cfg_degree: int = 0
    ring_degree: int = 0
    ulysses_degree: int = 0
    tp_degree: int = 1
    fsdp: bool = False
    ring_exchange: str = "rotate"
    overlap: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("ranks", "cfg_degree", "ring_degree", "ulysses_degree"):
            if not 0 <= getattr(self, name) <= MAX_RANKS:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 to {MAX_RANKS}, or 0 for automatic.")
        if self.cfg_degree > 2:
            raise ValueError(
                f"cfg_degree is {self.cfg_degree}; it can be 1 or 2, as guidance has two branches. "
                "Put the other ranks on ulysses_degree."
            )
        _require_range("tp_degree", self.tp_degree, 1, MAX_RANKS)
        _require_choice("ring_exchange", self.ring_exchange, RING_EXCHANGES)
        if self.ranks:
            self.resolve(self.ranks, guided=True)

    def resolve(self, world_size: int, *, guided: bool) -> Plan:
        """The plan for a group of `world_size` ranks. Without guidance every rank works on the one branch.

        Raises ValueError where given degrees do not make the given ranks, or the group has other ranks.
        """
        if self.ranks not in (0, world_size):
            raise ValueError(
                f"The plan is for {self.ranks} ranks, but the group has {world_size}. Give a plan for {world_size}, "
                f"or start a group of {self.ranks}."
            )
        given = {axis: getattr(self, f"{axis}_degree") for axis in AXES}
        wish = {axis: degree for axis, degree in given.items() if degree}
        plan = choose(world_size, wish)
        if plan is None and self.ranks:
            raise ValueError(self._mismatch(given, nearest(world_size, wish)[:3]))
        if plan is None:  # weights that can be cut into 4 slices can be cut into 2, and perhaps not into 3
            plan = next(plan for plan in nearest(world_size, wish) if self.tp_degree % plan.tp == 0)
        return plan if guided else plan.unguided()

    def _mismatch(self, given: dict[str, int], plans: list[Plan]) -> str:
        product = " x ".join(f"{axis}_degree {degree or 'auto'}" for axis, degree in given.items())
        return (
            f"{product} does not make {self.ranks} ranks. The nearest plans that do ({' x '.join(AXES)}): "
            f"{', '.join(map(str, plans))}. Change the degrees or the ranks, or set them to 0 for automatic "
            "(tp_degree to 1)."
        )


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
        _make_absolute(self, "path")
        _require_range("strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)
        _require_choice("expert", self.expert, LORA_EXPERTS)


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
        _make_absolute(self, "path", "low_noise_path")
        if self.low_noise_path is not None:
            require_experts_in_order(self.path, self.low_noise_path)
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("experts", self.experts, EXPERTS)
        _require_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.quantization != "none":
            require_no_loras(self.loras, f"quantization is {self.quantization!r}")
        if self.boundary is not None:
            _require_range("boundary", self.boundary, 0.0, 1.0)

    def with_lora(self, lora: LoraSpec) -> DiffusionModelSpec:
        """The same with one LoRA more."""
        return replace(self, loras=(*self.loras, lora))


def require_no_loras(loras: tuple[LoraSpec, ...], why: str) -> None:
    """Raises ValueError where there are some: what is merged into integers of 8 bits would be rounded away."""
    if loras:
        raise ValueError(
            f"{why}, and weights in 8 bits take no LoRA ({loras[0].path}). Set quantization to 'none' with the model's "
            "bf16, fp16 or fp8_scaled files, or leave the LoRA out."
        )


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
        _make_absolute(self, "path")
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("placement", self.placement, PLACEMENTS)


class VaeSpec(Spec, frozen=True, kw_only=True):
    """A Wan VAE.

    path: a folder or a file, told by what is in it: diffusers' (`vae/`), the original's (a .pth in it), or one file.
    """

    path: str
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        _make_absolute(self, "path")
        _require_choice("dtype", self.dtype, DTYPES)


class OperatorSpec(Spec, frozen=True, kw_only=True):
    """Which operators compute, where a device has several for the same thing.

    attention, on an NPU (elsewhere torch's own serves for all but fp8, which is refused):
        auto: what the variable ALGO asks for on NPUs, else fused.
        fused: npu_fusion_attention, ALGO=0 of the original systems.
        laser: MindIE SD's laser attention, ALGO=1: its products are fp16, the sum fp32.
        infer: npu_fused_infer_attention_score, ALGO=3.
        fastest: MindIE SD times what it has at the first use of a shape and takes the fastest; two runs may differ.
        fp8: MXFP8 products, on cards of the 950 series alone; an approximation.
        plain: torch's scaled_dot_product_attention.
    heads_per_call: heads that one attention call computes, which bounds its memory; 0: all, unless the variable
        USE_SUB_HEAD asks for another number.
    layer_norm: fused: in the dtype of the blocks; fp32: upcast, as on other devices. auto: what FAST_LAYERNORM asks
        for, else fused.
    """

    attention: str = "auto"
    heads_per_call: int = 0
    layer_norm: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        _require_choice("attention", self.attention, ATTENTIONS)
        _require_choice("layer_norm", self.layer_norm, LAYER_NORMS)
        _require_range("heads_per_call", self.heads_per_call, 0, 1024)


class ProfileSpec(Spec, frozen=True, kw_only=True):
    """Which steps of a sampling job to record with the profiler, on which rank, and where to.

    folder: gets one folder a recording, its name made of the time and the rank: a Chrome trace, which TensorBoard and
        Perfetto open; from an NPU, what MindStudio Insight opens.
    first_step, last_step: both recorded, counted from 1. Where the job has fewer, the recording ends with it.
    """

    folder: str
    first_step: int = 2
    last_step: int = 2
    rank: int = 0

    def __post_init__(self):
        super().__post_init__()
        _make_absolute(self, "folder")
        _require_range("first_step", self.first_step, 1, 1000)
        _require_range("last_step", self.last_step, self.first_step, 1000)
        _require_range("rank", self.rank, 0, MAX_RANKS - 1)

    def within(self, steps: int, ranks: int) -> ProfileSpec:
        """The part of it that a job of `steps` steps on `ranks` ranks can record.

        Raises ValueError where that is nothing.
        """
        if self.first_step > steps:
            raise ValueError(
                f"The profiler is to begin with step {self.first_step}, but the job has {steps}. "
                f"Give a first_step from 1 to {steps}, or the job more steps."
            )
        if self.rank >= ranks:
            raise ValueError(
                f"The profiler is to record rank {self.rank}, but there are {ranks} rank(s). Give 0 to {ranks - 1}."
            )
        return replace(self, last_step=min(self.last_step, steps))


class SampleSpec(Spec, frozen=True, kw_only=True):
    """How a latent is denoised. What is None is the model's own (families/defaults.py).

    guidance_scale: of classifier-free guidance, u + s(c - u); 1 computes the cond branch alone.
    guidance_scale_low_noise: that of the low-noise expert (None: as guidance_scale, where that is given).
    solver: unipc, euler or dpm++, in their flow-matching forms.
    schedule: "wan" is the original's own for the solver, "simple" is core ComfyUI's; both use `shift`.
    sigmas: replaces steps, schedule and shift: falling, from at most 1 down to at least 0.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_low_noise: float | None = None
    solver: str = "unipc"
    schedule: str = "wan"
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        _require_choice("solver", self.solver, SOLVERS)
        _require_choice("schedule", self.schedule, SCHEDULES)
        _require_range("seed", self.seed, 0, MAX_SEED)
        ranges = {"steps": (1, 1000), "shift": (0.01, 1000.0), "guidance_scale": (0.0, 1000.0),
                  "guidance_scale_low_noise": (0.0, 1000.0)}  # fmt: skip
        for name, bounds in ranges.items():
            if getattr(self, name) is not None:
                _require_range(name, getattr(self, name), *bounds)
        if self.sigmas is not None:
            _require_sigmas(self.sigmas)

    @property
    def total_steps(self) -> int | None:
        """How many steps there are, whether they are counted or given as sigmas; None: the model knows."""
        return self.steps if self.sigmas is None else len(self.sigmas) - 1

    @property
    def low_noise_guidance(self) -> float:
        scale = self.guidance_scale_low_noise
        return self.guidance_scale if scale is None else scale


def _require_sigmas(sigmas: tuple[float, ...]) -> None:
    falling = all(a > b for a, b in zip(sigmas, sigmas[1:]))
    if len(sigmas) < 2 or not falling or not all(map(math.isfinite, sigmas)) or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(
            f"sigmas are {list(sigmas)}; give at least two falling values from at most 1 down to at least 0, "
            "such as those of a flow-matching scheduler (1.0, 0.94, 0.83, 0.63, 0.0)."
        )


class VideoSize(Spec, frozen=True, kw_only=True):
    """Pixels and frames of a video that the Wan networks can make: multiples of 16, and 4n+1 frames.

    Raises ValueError, with the nearest that can be made.
    """

    width: int = 832
    height: int = 480
    num_frames: int = 81

    def __post_init__(self):
        super().__post_init__()
        for name, step, offset, highest in (
            ("width", 16, 0, MAX_SIDE), ("height", 16, 0, MAX_SIDE), ("num_frames", 4, 1, MAX_FRAMES)
        ):  # fmt: skip
            _require_multiple(name, getattr(self, name), step, offset, highest)
        if self.width * self.height * self.num_frames > MAX_PIXELS:
            most = max(1, (MAX_PIXELS // (self.width * self.height) - 1) // 4 * 4 + 1)
            raise ValueError(
                f"{self.width}x{self.height} x {self.num_frames} frames are more pixels than a video can have. Give at "
                f"most {most} frames of this size, or a smaller size."
            )

    def latent_shape(self, channels: int = 16, spatial: int = 8, temporal: int = 4) -> tuple[int, ...]:
        """Shape [B=1, C, T, H, W] of the latent of a VAE with these factors."""
        frames = (self.num_frames - 1) // temporal + 1
        return (1, channels, frames, self.height // spatial, self.width // spatial)
