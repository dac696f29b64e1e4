"""`python -m ascend_runtime calibrate MODEL`: finds out what TeaCache and MagCache have to know of a model."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from .acceleration import AccelerationSpec, Calibration
from .checkpoints.calibration import calibration_file, write_calibration
from .checkpoints.layout import find_transformer, has_low_noise
from .client import Runtime
from .families.defaults import TI2V_CHANNELS
from .specs import DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VideoSize

PROMPTS = (
    "A white cat on a surfboard looks at the sea, holiday weather.",
    "A woman in a red dress walks through a rainy city at night, neon signs, close-up.",
    "Waves break on black rocks under a grey sky, seen from the air.",
    "A chef tosses vegetables in a pan, flames rise, slow motion.",
)
DEGREE = 4  # of TeaCache's polynomial
RANDOM_TOKENS = 20


def add_command(commands, does: str) -> None:
    parser = commands.add_parser("calibrate", help=does, description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a text-to-video model's folder or file")
    add("--low-noise", metavar="PATH", help="its low-noise expert, where that lies elsewhere")
    add("--text-encoder", metavar="PATH", help="a folder or a file (default: that in the model's folder)")
    add("--prompt", action="append", metavar="TEXT",
        help="of a video to make; several are averaged (default: four of this command's own)")  # fmt: skip
    add("--random-prompts", type=int, metavar="N", help="N random embeddings instead, without an encoder")
    add("--steps", type=int, help="(default: the model's own, as for the next two)")
    add("--shift", type=float)
    add("--guidance", type=float)
    add("--size", default="832x480", metavar="WIDTHxHEIGHT", help="(default: %(default)s)")
    add("--frames", type=int, default=81, help="4n+1 (default: %(default)s)")
    add("--ranks", type=int, default=0, help="(default: one a device)")
    add("--device", default="auto", help="npu, cuda or cpu (default: the first of these that is there)")
    add("--output", type=Path, metavar="FILE", help="(default: beside the model, where jobs look for it)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Makes a video for each prompt, and writes what was found. Returns 0 where that was done."""
    try:
        output = arguments.output or calibration_file(arguments.model)
        found = calibrate(arguments)
        write_calibration(output, found)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{output}: {', '.join(f'{len(one.ratios)} steps of {expert}' for expert, one in found.items())}")
    return 0


def calibrate(arguments: argparse.Namespace) -> dict[str, Calibration]:
    """What there is to know of each expert. Raises ValueError for what cannot be done."""
    model = DiffusionModelSpec(path=arguments.model, low_noise_path=arguments.low_noise)
    config = find_transformer(model.path).config
    given = {"steps": arguments.steps, "shift": arguments.shift, "guidance_scale": arguments.guidance}
    changes, empty = [], _empty(arguments, config)
    with Runtime(ParallelSpec(ranks=arguments.ranks), device=arguments.device) as runtime:
        for number, (positive, negative) in enumerate(_prompts(arguments, runtime, config)):
            result = runtime.sample(
                model, SampleSpec(seed=number, **given), empty, positive, negative,
                acceleration=AccelerationSpec(measure=True),
            )  # fmt: skip
            changes.append(result.info["acceleration"]["changes"])
            steps = result.info["steps"]
            print(f"video {number + 1}: {steps} steps in {result.seconds['denoise']:.1f} s", flush=True)
    made = f"{len(changes)} video(s) of {arguments.size} x {arguments.frames} in {steps} steps"
    found = fitted(changes, f"calibrated with {made}, shift {result.info['shift']:g}")
    if len(found) < (2 if arguments.low_noise or has_low_noise(model.path) else 1):
        raise ValueError(f"In {steps} steps an expert has less than two, which tell no change. Give more --steps.")
    return found


def fitted(videos: list[list[dict]], source: str) -> dict[str, Calibration]:
    """What is known of each expert after some videos of as many steps. videos: `accelerate.report.Change` as dicts."""
    by_expert: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for change in (change for video in videos for change in video):
        by_expert[change["expert"]][change["step"]].append(change)
    return {expert: _fitted(steps, source) for expert, steps in by_expert.items()}


def _fitted(steps: dict[int, list[dict]], source: str) -> Calibration:
    """Of one expert, of the changes in each of its steps but the first."""
    changes = [change for step in sorted(steps) for change in steps[step]]
    x, y = (np.array([change[name] for change in changes]) for name in ("timestep", "output"))
    degree = min(DEGREE, len(steps) - 1)  # through fewer points than it has coefficients goes more than one
    coefficients = tuple(float(f"{coefficient:.9g}") for coefficient in np.polyfit(x, y, degree))
    ratios = (1.0, *(round(mean(change["ratio"] for change in steps[step]), 5) for step in sorted(steps)))
    return Calibration(coefficients=coefficients, ratios=ratios, source=source)


def _empty(arguments: argparse.Namespace, config: dict) -> Tensor:
    """Where a new video starts. Raises ValueError where the model makes none of a text alone."""
    inputs, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
    if inputs != outputs:
        raise ValueError(
            f"{arguments.model} makes videos of an image, which this command has none of. What was published of such "
            "models is used without a calibration; else take fbcache or taylorseer, which need none."
        )
    width, _, height = arguments.size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size is {arguments.size}; give two numbers of pixels, such as 832x480.")
    size = VideoSize(width=int(width), height=int(height), num_frames=arguments.frames)
    return torch.zeros(size.latent_shape(outputs, spatial=16 if outputs == TI2V_CHANNELS else 8))


def _prompts(arguments: argparse.Namespace, runtime: Runtime, config: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """The embeddings [1, tokens, D] of each prompt and of the empty one."""
    if arguments.random_prompts:
        for seed in range(arguments.random_prompts):
            generator = torch.Generator().manual_seed(seed)
            yield torch.randn(2, 1, RANDOM_TOKENS, config.get("text_dim", 4096), generator=generator).unbind()
        return
    if arguments.text_encoder is None and not Path(arguments.model).is_dir():
        raise ValueError("A file of a model has no text encoder beside it: give one with --text-encoder.")
    encoder = TextEncoderSpec(path=arguments.text_encoder or arguments.model)
    for prompt in arguments.prompt or PROMPTS:
        yield runtime.encode(encoder, prompt).tensor, runtime.encode(encoder, "").tensor
