"""`python -m ascend_runtime calibrate MODEL`: measures the calibration of TeaCache and MagCache for a model."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from statistics import mean

import numpy as np
import torch
from msgspec.structs import replace

from ..checkpoints.faults import printable
from ..client.group import RankDied
from ..client.runtime import Runtime
from ..client.submission import RankError
from ..recognition.calibration_file import calibration_file, write_calibration
from ..recognition.component import Component
from ..recognition.defaults import model_defaults
from ..recognition.folders import has_low_noise
from ..recognition.layout import find_transformer
from ..specs import AccelerationSpec, Calibration, ParallelSpec, SampleSpec, VaeForm, VideoSize
from ..wire.messages import Conditioning
from . import video_options
from .progress import ProgressDisplay

PROMPTS = (
    "A white cat on a surfboard looks at the sea, holiday weather.",
    "A woman in a red dress walks through a rainy city at night, neon signs, close-up.",
    "Waves break on black rocks under a grey sky, seen from the air.",
    "A chef tosses vegetables in a pan, flames rise, slow motion.",
)
DEGREE = 4  # degree of TeaCache's polynomial
RANDOM_TOKENS = 20


def run(arguments: Namespace, progress: ProgressDisplay | None = None) -> int:
    """Samples a video for each prompt and writes the calibration. Returns 0. Raises ValueError for an invalid request,
    OSError if the file cannot be written."""
    progress = progress or ProgressDisplay()
    output = arguments.output or calibration_file(arguments.model)
    try:
        found = calibrate(arguments, progress)
    except (RankError, RankDied) as error:
        raise ValueError(str(error)) from error
    progress.end()
    write_calibration(output, found)
    steps = ", ".join(f"{len(one.ratios)} steps of {expert}" for expert, one in found.items())
    print(printable(f"{output}: {steps}"))
    return 0


def calibrate(arguments: Namespace, progress: ProgressDisplay) -> dict[str, Calibration]:
    """The calibration of each expert. Raises ValueError for an invalid request."""
    model = video_options.model_of(arguments)
    transformer = find_transformer(model.path)
    size, spec, form = _video(arguments, transformer)
    changes, empty = [], torch.zeros(form.latent_shape(size))
    count = arguments.random_prompts or len(arguments.prompt or PROMPTS)
    with Runtime(ParallelSpec(ranks=arguments.ranks), device=arguments.device) as runtime:
        progress.say(f"{video_options.counted(count, 'video')} of {video_options.summary(size, spec)}; "
                     f"{video_options.counted(runtime.world_size, 'rank')} on {runtime.device}")  # fmt: skip
        progress.begin("starting the ranks")
        runtime.start()
        for number, (positive, negative) in enumerate(_prompts(arguments, runtime, transformer, progress)):
            progress.title(f"video {number + 1} of {count}")
            result = runtime.sample(
                model, replace(spec, seed=number), empty, positive, negative,
                acceleration=AccelerationSpec(measure=True), on_progress=progress.on_progress,
            )  # fmt: skip
            changes.append(result.info["acceleration"]["changes"])
            progress.say(f"video {number + 1} of {count}: denoised in {result.seconds['denoise']:.1f} s")
    videos = video_options.counted(count, "video")
    made = f"{videos} of {size.width}x{size.height} x {size.num_frames} in {spec.steps} steps"
    found = fitted(changes, f"calibrated with {made}, shift {result.info['shift']:g}")
    if len(found) < (2 if arguments.low_noise or has_low_noise(model.path) else 1):
        raise ValueError(f"With {spec.steps} steps, an expert has fewer than the two it needs. Give more --steps.")
    return found


def fitted(videos: list[list[dict]], source: str) -> dict[str, Calibration]:
    """Fits the calibration of each expert to measured videos, each a list of `acceleration.tally.Change` as dicts."""
    by_expert: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for change in (change for video in videos for change in video):
        by_expert[change["expert"]][change["step"]].append(change)
    return {expert: _fitted(steps, source) for expert, steps in by_expert.items()}


def _fitted(steps: dict[int, list[dict]], source: str) -> Calibration:
    """Fits one expert's calibration. steps: the changes in each of its steps, without the first."""
    changes = [change for step in sorted(steps) for change in steps[step]]
    x, y = (np.array([change[name] for change in changes]) for name in ("timestep", "output"))
    degree = min(DEGREE, len(steps) - 1)  # with fewer points than coefficients, the polynomial is not unique
    coefficients = tuple(float(f"{coefficient:.9g}") for coefficient in np.polyfit(x, y, degree))
    ratios = (1.0, *(round(mean(change["ratio"] for change in steps[step]), 5) for step in sorted(steps)))
    return Calibration(coefficients=coefficients, ratios=ratios, source=source)


def _video(arguments: Namespace, found: Component) -> tuple[VideoSize, SampleSpec, VaeForm]:
    """The videos' size, settings and latent form, with the model's own values filled in. Raises ValueError if the model
    does not support text-to-video."""
    if not found.family.makes_from_text(found.config):
        raise ValueError(
            f"{arguments.model} needs an image, but calibration uses text-to-video. For such models, "
            "jobs use published values if there are any. If not, use fbcache or taylorseer: they need no calibration."
        )
    form = found.family.form(found.config)
    own = model_defaults(arguments.model, arguments.low_noise)
    size = video_options.size_of(arguments, own.size, form.multiple)
    return size, own.fill(video_options.sampling_of(arguments, seed=0), pixels=size.width * size.height), form


def _prompts(
    arguments: Namespace, runtime: Runtime, transformer: Component, progress: ProgressDisplay
) -> Iterator[tuple[Conditioning, Conditioning]]:
    """Yields the conditioning of each prompt, and of the empty negative prompt."""
    if arguments.random_prompts:
        for seed in range(arguments.random_prompts):
            generator = torch.Generator().manual_seed(seed)
            yield _random_prompts(transformer, generator)
        return
    encoder = video_options.encoder_of(arguments)
    for prompt in arguments.prompt or PROMPTS:
        positive, negative = (
            runtime.encode(encoder, text, on_progress=progress.on_progress).conditioning for text in (prompt, "")
        )
        yield positive, negative


def _random_prompts(transformer: Component, generator: torch.Generator) -> tuple[Conditioning, Conditioning]:
    """Noise in place of a positive and a negative prompt: in every input that the model reads of a prompt."""
    family, config = transformer.family, transformer.config
    texts = torch.randn(2, 1, RANDOM_TOKENS, family.text_width(config), generator=generator)
    width = family.pooled_width(config)
    pooled = torch.randn(2, 1, width, generator=generator) if width else (None, None)
    positive, negative = (Conditioning(text=text, pooled=vector) for text, vector in zip(texts, pooled))
    return positive, negative
