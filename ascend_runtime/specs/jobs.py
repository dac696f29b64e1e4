"""What a sampling job is made of besides its model: size, steps, operators, what to record."""

from __future__ import annotations

import math

from msgspec.structs import replace

from .base import Spec, make_absolute, require_choice, require_multiple, require_range
from .parallel import MAX_RANKS

SOLVERS = ("unipc", "euler", "dpm++")
OWN, SIMPLE = "own", "simple"  # schedules: the model's, as its publishers spread the steps, and core ComfyUI's
ATTENTIONS = ("auto", "fused", "laser", "infer", "fastest", "fp8", "plain")
LAYER_NORMS = ("auto", "fused", "fp32")
MAX_SEED = 2**64 - 1
MAX_SIDE = 16384  # pixels: 1024 positions of 2 x 2 latents of 8 x 8, which is how many a published network knows
MAX_FRAMES = 4093  # 1024 positions of a latent frame
MAX_PIXELS = 2**33  # of all frames, so that a size out of a file cannot ask for more memory than a machine has


class SampleSpec(Spec, frozen=True, kw_only=True):
    """How a latent is denoised. What is None is the model's own (models/defaults.py).

    guidance_scale: of classifier-free guidance, u + s(c - u); 1 computes only the cond branch.
    guidance_scale_low_noise: that of the low-noise expert (None: as guidance_scale, where that is given).
    solver: unipc, euler or dpm++, in their flow-matching forms.
    schedule: "own" is the model's, as its publishers spread the steps for the solver; "simple" is core ComfyUI's; both
        use `shift`. A name under which a family was known as a schedule (models.registry.schedules) stands for "own".
    sigmas: replaces steps, schedule and shift: falling, from at most 1 down to at least 0.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_low_noise: float | None = None
    solver: str = "unipc"
    schedule: str = OWN
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_choice("solver", self.solver, SOLVERS)
        require_range("seed", self.seed, 0, MAX_SEED)
        ranges = {"steps": (1, 1000), "shift": (0.01, 1000.0), "guidance_scale": (0.0, 1000.0),
                  "guidance_scale_low_noise": (0.0, 1000.0)}  # fmt: skip
        for name, bounds in ranges.items():
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), *bounds)
        if self.sigmas is not None:
            _require_sigmas(self.sigmas)

    @property
    def total_steps(self) -> int | None:
        """The number of steps, counted or given as sigmas; None: as many as the model is made for."""
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
            require_multiple(name, getattr(self, name), step, offset, highest)
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
        require_choice("attention", self.attention, ATTENTIONS)
        require_choice("layer_norm", self.layer_norm, LAYER_NORMS)
        require_range("heads_per_call", self.heads_per_call, 0, 1024)


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
        make_absolute(self, "folder")
        require_range("first_step", self.first_step, 1, 1000)
        require_range("last_step", self.last_step, self.first_step, 1000)
        require_range("rank", self.rank, 0, MAX_RANKS - 1)

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
