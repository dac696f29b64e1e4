"""Options of the commands that make videos: which model, how large, how long, how sampled. Free of torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from ..checkpoints.paths import existing
from ..specs import DiffusionModelSpec, ParallelSpec, SampleSpec, VideoSize
from ..specs.models import DTYPES

DEVICES = ("auto", "npu", "cuda", "cpu")
OWN = "(default: the model's own)"
PATHS = ("model", "low_noise", "text_encoder", "vae")


def add_model(add: Callable) -> None:
    """add: of an argparse parser."""
    add("model", metavar="MODEL", help="a text-to-video model's folder or file")
    add("--low-noise", metavar="PATH", help="its low-noise expert, where that lies elsewhere")
    add("--text-encoder", metavar="PATH", help="a folder or a file (default: that in the model's folder)")
    add("--dtype", choices=DTYPES, default="auto", help="of the model (default: float32 on a CPU, else bfloat16)")


def add_video(add: Callable) -> None:
    add("--size", metavar="WIDTHxHEIGHT", help=f"of the video, in pixels {OWN}")
    add("--frames", type=int, metavar="N", help=f"of the video: 4n+1 {OWN}")
    add("--steps", type=int, metavar="N", help=f"of the sampler {OWN}")
    add("--shift", type=float, help=f"of the noise schedule: more keeps the noise high for longer {OWN}")
    add("--guidance", type=float, help=f"the scale of classifier-free guidance; 1: none {OWN}")


def add_ranks(add: Callable) -> None:
    add("--ranks", type=int, default=0, metavar="N", help="processes that share the work (default: one a device)")
    add("--device", choices=DEVICES, default="auto", help="(default: the first of npu, cuda, cpu that is there)")


def check(arguments: Namespace) -> None:
    """Raises ValueError for what cannot be, whatever the model is."""
    for name in PATHS:
        if getattr(arguments, name, None) is not None:
            existing(getattr(arguments, name))
    model_of(arguments)
    sampling_of(arguments, seed=0)
    size_of(arguments, VideoSize())
    ParallelSpec(ranks=arguments.ranks)


def model_of(arguments: Namespace) -> DiffusionModelSpec:
    return DiffusionModelSpec(path=arguments.model, low_noise_path=arguments.low_noise, dtype=arguments.dtype)


def sampling_of(arguments: Namespace, seed: int) -> SampleSpec:
    """With None for what is the model's own."""
    given = {"steps": arguments.steps, "shift": arguments.shift, "guidance_scale": arguments.guidance}
    return SampleSpec(seed=seed, **given)


def size_of(arguments: Namespace, own: VideoSize, multiple: int = 16) -> VideoSize:
    """The size of a video. own: the model's. multiple: of how many pixels its sides are. Raises ValueError, with the
    nearest size that can be."""
    width, height = own.width, own.height
    if arguments.size is not None:
        width, height = _sides(arguments.size)
    frames = own.num_frames if arguments.frames is None else arguments.frames
    size = VideoSize(width=width, height=height, num_frames=frames)
    for name, pixels in (("width", width), ("height", height)):
        if pixels % multiple:
            down = max(multiple, pixels // multiple * multiple)
            raise ValueError(f"{name} is {pixels}; of this model's videos it is a multiple of {multiple}. The nearest "
                             f"are {down} and {down + multiple}.")  # fmt: skip
    return size


def _sides(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()) or len(text) > 20:
        raise ValueError(f"--size is {text!r}; give WIDTHxHEIGHT, such as 832x480.")
    return int(width), int(height)


def counted(count: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {what}{'s' * (count != 1)}"


def said(size: VideoSize, spec: SampleSpec) -> str:
    """What a video is made with, in words. spec: filled."""
    scale = f"{spec.guidance_scale:g}"
    if spec.guidance_scale_low_noise is not None:
        scale += f" and {spec.guidance_scale_low_noise:g} (low noise)"
    return (f"{size.width}x{size.height}, {size.num_frames} frames, {spec.steps} steps, shift {spec.shift:g}, "
            f"guidance {scale}")  # fmt: skip
