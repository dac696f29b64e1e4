"""Settings of a sampling job besides its model: size, steps, operators and profiling."""

from __future__ import annotations

import math

from msgspec.structs import replace

from .base import Spec, make_absolute, require_choice, require_multiple, require_range
from .parallel import MAX_RANKS

SOLVERS = ("unipc", "euler", "dpm++")
OWN, SIMPLE = "own", "simple"  # schedules: the published model's, and core ComfyUI's "simple"
ATTENTIONS = ("auto", "fused", "laser", "infer", "fastest", "fp8", "plain")
LAYER_NORMS = ("auto", "fused", "fp32")
MAX_SEED = 2**64 - 1
MAX_STEP = 10_000  # core ComfyUI's limit of start_at_step and end_at_step; a run may be shorter
MAX_SIDE = 16384  # pixels: published networks have 1024 position embeddings, each for 2 x 2 latents of 8 x 8 pixels
MAX_FRAMES = 4093  # the same 1024 positions in time, each for a latent frame
MAX_PIXELS = 2**33  # of all frames: a size read from a file must not request more memory than a machine has


class SampleSpec(Spec, frozen=True, kw_only=True):
    """How a latent is denoised. None stands for the model's own value (models/defaults.py).

    guidance_scale: the scale s of classifier-free guidance, u + s(c - u); 1 computes only the cond branch.
    guidance_scale_low_noise: the low-noise expert's scale (None: guidance_scale, if that is given).
    embedded_guidance: the scale that a network reads as an input, for models that were distilled so (HunyuanVideo).
        A conditioning's own "guidance" takes its place.
    solver: unipc, euler or dpm++, in their flow-matching forms.
    image_start: whether a video that begins with an image starts from 99.9 % noise and 0.1 % of that image in all of
        its frames: "i2v_stability" of HunyuanVideo-I2V's authors, which diffusers always does and core ComfyUI never.
    schedule: "own" is the published model's for the solver, "simple" is core ComfyUI's; both use `shift`.
        The older names in models.registry.schedules are accepted for "own".
    sigmas: noise levels that replace steps, schedule and shift: decreasing, from at most 1 down to at least 0.
    start_step, end_step: the steps of the run that this job computes, counted from 0; end_step is not one of them
        (None: up to the last). Several jobs can share a run: schedule, experts and accelerators go by its steps.
    add_noise: whether noise of the seed is added to the latent. False: the latent is another job's unfinished one,
        with the noise of start_step; one of zeros stays without noise.
    leftover_noise: whether a job that ends early returns the latent with the noise of end_step, for the next job.
        False: its last step goes down to sigma 0. Both as in core ComfyUI's KSamplerAdvanced.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_low_noise: float | None = None
    embedded_guidance: float | None = None
    solver: str | None = None
    schedule: str = OWN
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    image_start: bool = False
    start_step: int = 0
    end_step: int | None = None
    add_noise: bool = True
    leftover_noise: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.solver is not None:
            require_choice("solver", self.solver, SOLVERS)
        require_range("seed", self.seed, 0, MAX_SEED)
        ranges = {"steps": (1, 1000), "shift": (0.01, 1000.0), "guidance_scale": (0.0, 1000.0),
                  "guidance_scale_low_noise": (0.0, 1000.0), "embedded_guidance": (0.0, 1000.0)}  # fmt: skip
        for name, bounds in ranges.items():
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), *bounds)
        if self.sigmas is not None:
            _require_sigmas(self.sigmas)
        _require_part_of_run(self)

    @property
    def total_steps(self) -> int | None:
        """The number of steps of the run, given directly or by sigmas; None is the model's own number."""
        return self.steps if self.sigmas is None else len(self.sigmas) - 1

    @property
    def computed_steps(self) -> range:
        """The steps that this job computes. Raises ValueError if there is none. Needs `total_steps`."""
        total = self.total_steps
        steps = range(self.start_step, total if self.end_step is None else min(self.end_step, total))
        if not steps:
            raise ValueError(
                f"start_step is {self.start_step}, but the run has {total} steps, 0 to {total - 1}. Give a start_step "
                f"below {total}, or more steps."
            )
        return steps

    @property
    def ends_at(self) -> int:
        """The step at which the run's schedule ends: at `total_steps`, or where a job's last step goes down to sigma 0
        before. Needs `total_steps`."""
        return self.total_steps if self.leftover_noise else self.computed_steps.stop

    @property
    def low_noise_guidance(self) -> float:
        scale = self.guidance_scale_low_noise
        return self.guidance_scale if scale is None else scale


def _require_sigmas(sigmas: tuple[float, ...]) -> None:
    falling = all(a > b for a, b in zip(sigmas, sigmas[1:]))
    if len(sigmas) < 2 or not falling or not all(map(math.isfinite, sigmas)) or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(
            f"sigmas are {list(sigmas)}; give at least two decreasing values from at most 1 down to at least 0, "
            "such as those of a flow-matching scheduler (1.0, 0.94, 0.83, 0.63, 0.0)."
        )


def _require_part_of_run(spec: SampleSpec) -> None:
    require_range("start_step", spec.start_step, 0, MAX_STEP)
    if spec.end_step is not None:
        require_range("end_step", spec.end_step, 0, MAX_STEP)
        if spec.start_step >= spec.end_step:
            raise ValueError(
                f"start_step is {spec.start_step} and end_step is {spec.end_step}, which leaves no step: end_step is "
                "the first one that is not computed. Give an end_step above start_step, or None for all that follow."
            )
    if spec.image_start and not spec.add_noise:
        raise ValueError("image_start puts an image into the noise, but add_noise is False. Change one of them.")


class VideoSize(Spec, frozen=True, kw_only=True):
    """The size of a video: width and height in pixels (multiples of 16), and 4n+1 frames.

    Raises ValueError, with the nearest valid size.
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
                f"{self.width}x{self.height} x {self.num_frames} frames exceed {MAX_PIXELS} pixels, a video's limit. "
                f"Give at most {most} frames of this size, or a smaller size."
            )

    @classmethod
    def of_seconds(cls, width: int, height: int, seconds: float, fps: float) -> VideoSize:
        """The size of a video of this duration, in the nearest number of frames that a model makes: 4n+1."""
        frames = 4 * math.floor(seconds * fps / 4 + 0.5) + 1
        try:
            return cls(width=width, height=height, num_frames=frames)
        except ValueError as error:
            raise ValueError(f"{seconds:g} seconds at {fps:g} frames per second are {frames} frames. {error}") from None

    def latent_shape(self, channels: int = 16, spatial: int = 8, temporal: int = 4) -> tuple[int, ...]:
        """The shape [B=1, C, T, H, W] of the latent for a VAE with these channels and compression factors."""
        frames = (self.num_frames - 1) // temporal + 1
        return (1, channels, frames, self.height // spatial, self.width // spatial)


class OperatorSpec(Spec, frozen=True, kw_only=True):
    """The operators to use if a device has several implementations.

    attention, on an NPU (other devices use torch's own for every value but fp8, which they reject):
        auto: set by the environment variable ALGO on NPUs, else infer in 16-bit dtypes; in float32 fused, or on A3
            cards, which have no such operator, plain.
        fused: npu_fusion_attention, ALGO=0 of the original systems. Its documentation names A2 and 950 cards; an A3
            uses auto instead, and warns.
        laser: MindIE SD's laser attention, ALGO=1: fp16 products accumulated in fp32. Sequences shorter than 2048
            tokens use infer.
        infer: npu_fused_infer_attention_score, ALGO=3.
        fastest: MindIE SD benchmarks its operators on the first use of a shape; two runs may choose differently. An A3
            uses auto instead, as one of them is fused.
        fp8: MXFP8 products, only on cards of the 950 series; an approximation.
        plain: torch's scaled_dot_product_attention; on A3 cards basic operators, which are slow.
    heads_per_call: the number of heads per attention call, which bounds memory. 0 is all heads, or the value of the
        environment variable USE_SUB_HEAD.
    layer_norm: fused computes in the dtype of the blocks; fp32 upcasts, as on other devices. auto: set by the
        environment variable FAST_LAYERNORM, else fused.
    fused_all_reduce: whether an A2 card computes a matrix product of tensor parallelism and its all-reduce by one
        operator, with tp_degree 2, 4 or 8. Its page (op-plugin, npu_mm_all_reduce_base) requires all cards to be linked
        to each other by HCCS, and warns of memory and time-outs with long sequences: off by default. The environment
        variable ASCEND_RUNTIME_FUSED_ALL_REDUCE=1 turns it on too.
    """

    attention: str = "auto"
    heads_per_call: int = 0
    layer_norm: str = "auto"
    fused_all_reduce: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_choice("attention", self.attention, ATTENTIONS)
        require_choice("layer_norm", self.layer_norm, LAYER_NORMS)
        require_range("heads_per_call", self.heads_per_call, 0, 1024)


class ProfileSpec(Spec, frozen=True, kw_only=True):
    """The steps of a sampling job to profile, the rank to profile, and the output folder.

    folder: each recording is a subfolder named after the time and the rank. It holds a Chrome trace for TensorBoard
        and Perfetto, or on an NPU the files for MindStudio Insight.
    first_step, last_step: both included, counted from 1. A recording ends with the job at the latest.
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
        """This spec, limited to a job with `steps` steps on `ranks` ranks.

        Raises ValueError if nothing would be recorded.
        """
        if self.first_step > steps:
            raise ValueError(
                f"The profiler's first_step is {self.first_step}, but the job has {steps} steps. "
                f"Give a first_step from 1 to {steps}, or more steps."
            )
        if self.rank >= ranks:
            raise ValueError(
                f"The profiler's rank is {self.rank}, but there are {ranks} rank(s). Give 0 to {ranks - 1}."
            )
        return replace(self, last_step=min(self.last_step, steps))
