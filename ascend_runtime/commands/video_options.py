"""Options of the commands that make videos: model, size, sampling and ranks. Does not import torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from ..checkpoints.paths import existing
from ..specs import DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VideoSize
from ..specs.base import require_side
from ..specs.models import COMPUTE_DTYPES

DEVICES = ("auto", "npu", "cuda", "cpu")
MODEL_DEFAULT = "(default: the model's own)"
PATHS = ("model", "low_noise", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


def add_model(add: Callable) -> None:
    """add: a parser's `add_argument`."""
    add("model", metavar="MODEL", help="a text-to-video model's folder or file")
    add("--low-noise", metavar="PATH", help="its low-noise expert, if that is not under MODEL")
    add("--text-encoder", metavar="PATH", help="the text encoder's folder or file (default: in the model's folder)")
    add("--text-encoder-2", metavar="PATH", help="the second text encoder, if it is not there too")
    add("--tokenizer", metavar="PATH", help="the folder of a tokenizer, for a text encoder without one")
    add("--tokenizer-2", metavar="PATH", help="that of the second text encoder")
    add("--dtype", choices=COMPUTE_DTYPES, default="auto", help="(default: float32 on a CPU, else bfloat16)")


def add_video(add: Callable) -> None:
    add("--size", metavar="WIDTHxHEIGHT", help=f"size of the video in pixels {MODEL_DEFAULT}")
    add("--frames", type=int, metavar="N", help=f"number of frames, 4n+1 {MODEL_DEFAULT}")
    add("--steps", type=int, metavar="N", help=f"number of steps {MODEL_DEFAULT}")
    add("--shift", type=float, help=f"shift of the schedule; more moves steps towards high noise {MODEL_DEFAULT}")
    add("--guidance", type=float, help=f"the scale of classifier-free guidance; 1 disables it {MODEL_DEFAULT}")
    add("--embedded-guidance", type=float,
        help=f"the scale that models such as HunyuanVideo read as an input {MODEL_DEFAULT}")  # fmt: skip


def add_ranks(add: Callable) -> None:
    add("--ranks", type=int, default=0, metavar="N", help="number of processes (default: one per device)")
    add("--device", choices=DEVICES, default="auto", help="(default: the first available of npu, cuda, cpu)")


def check_options(arguments: Namespace) -> None:
    """Raises ValueError for options that are invalid for every model."""
    for name in PATHS:
        if getattr(arguments, name, None) is not None:
            existing(getattr(arguments, name))
    model_of(arguments)
    sampling_of(arguments, seed=0)
    size_of(arguments, VideoSize())
    ParallelSpec(ranks=arguments.ranks)


def model_of(arguments: Namespace) -> DiffusionModelSpec:
    return DiffusionModelSpec(path=arguments.model, low_noise_path=arguments.low_noise, dtype=arguments.dtype)


def encoder_of(arguments: Namespace) -> TextEncoderSpec:
    return TextEncoderSpec(
        path=arguments.text_encoder or arguments.model, path_2=arguments.text_encoder_2,
        tokenizer_path=arguments.tokenizer, tokenizer_path_2=arguments.tokenizer_2,
    )  # fmt: skip


def sampling_of(arguments: Namespace, seed: int) -> SampleSpec:
    """The sampling settings, with None for the model's own values."""
    given = {"steps": arguments.steps, "shift": arguments.shift, "guidance_scale": arguments.guidance,
             "embedded_guidance": arguments.embedded_guidance}  # fmt: skip
    return SampleSpec(seed=seed, **given)


def size_of(arguments: Namespace, own: VideoSize, multiple: int = 16) -> VideoSize:
    """The size of the video. own: the model's size. multiple: the unit of its width and height, in
    pixels. Raises ValueError, with the nearest valid size."""
    width, height = own.width, own.height
    if arguments.size is not None:
        width, height = _sides(arguments.size)
    frames = own.num_frames if arguments.frames is None else arguments.frames
    size = VideoSize(width=width, height=height, num_frames=frames)
    for name, pixels in (("width", width), ("height", height)):
        require_side(f"{name} is {pixels}; for this model", pixels, multiple)
    return size


def _sides(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()) or len(text) > 20:
        raise ValueError(f"--size is {text!r}; give WIDTHxHEIGHT, such as 832x480.")
    return int(width), int(height)


def counted(count: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {what}{'s' * (count != 1)}"


def summary(size: VideoSize, spec: SampleSpec) -> str:
    """The settings of a video as text. spec: with the model's own values filled in."""
    scale = f"{spec.guidance_scale:g}"
    if spec.guidance_scale_low_noise is not None:
        scale += f" and {spec.guidance_scale_low_noise:g} (low noise)"
    if spec.embedded_guidance is not None:
        scale += f", embedded guidance {spec.embedded_guidance:g}"
    return (f"{size.width}x{size.height}, {size.num_frames} frames, {spec.steps} steps, shift {spec.shift:g}, "
            f"guidance {scale}")  # fmt: skip
