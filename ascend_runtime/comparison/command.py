"""Makes one video as it is and with each setting of accelerators, and shows what that saves and changes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import video_options
from ..acceleration import AccelerationSpec
from ..checkpoints.layout import vae_form
from ..client import Runtime
from ..families.defaults import model_defaults
from ..launcher import RankDied
from ..progress import Progress
from ..specs import DiffusionModelSpec, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize
from ..submission import RankError, Result
from ..vae_form import VaeForm
from .settings import Setting, parallel_of, settings_of
from .table import PLAIN, Row, markdown


@dataclass(frozen=True)
class Video:
    """What is made, once plain and once with each setting. spec: filled with the model's own."""

    model: DiffusionModelSpec
    encoder: TextEncoderSpec
    vae: VaeSpec
    form: VaeForm
    size: VideoSize
    spec: SampleSpec
    fps: float

    @classmethod
    def of(cls, arguments: Namespace) -> Video:
        """Raises ValueError where the model cannot be read, or makes no such video."""
        own = model_defaults(arguments.model, arguments.low_noise)
        vae = VaeSpec(path=arguments.vae or arguments.model)
        form = vae_form(vae.path)
        size = video_options.size_of(arguments, own.size, 2 * form.spatial)
        return cls(
            model=video_options.model_of(arguments),
            encoder=TextEncoderSpec(path=arguments.text_encoder or arguments.model),
            vae=vae,
            form=form,
            size=size,
            spec=own.fill(video_options.sampling_of(arguments, arguments.seed), pixels=size.width * size.height),
            fps=own.fps if arguments.fps is None else arguments.fps,
        )


def run(arguments: Namespace, progress: Progress | None = None) -> int:
    """Compares, prints the table, writes the files. Returns 0 where all settings ran, 1 where one or all were refused.
    Raises ValueError and OSError, KeyboardInterrupt where that ended it; then nothing is written."""
    progress = progress or Progress()
    settings = [setting for text in arguments.setting for setting in settings_of(text)]
    arguments.output.mkdir(parents=True, exist_ok=True)  # rather now than after an hour
    try:
        video = Video.of(arguments)
        rows, frames = compare(arguments, video, settings, progress)
    except (RankError, RankDied) as error:
        raise ValueError(str(error)) from error
    progress.title("")
    progress.begin("writing the clip")
    write(rows, frames, arguments, video)
    progress.end()
    print(f"{markdown(rows)}\n{arguments.output}: comparison.md, .json, .png, .mp4", flush=True)
    return 1 if any(row.refused for row in rows) else 0


def compare(
    arguments: Namespace, video: Video, settings: list[Setting], progress: Progress
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for the plain video and each setting, and by name the frames of those that ran, uint8 [T,H,W,3]."""
    from .likeness import mean_ssim, psnr  # kornia is not of the pack's requirements

    rows, videos, plain = [], {}, None
    for name, made in _made(arguments, video, settings, progress):
        if isinstance(made, ValueError):
            rows.append(Row(name, refused=str(made)))
            continue
        result, frames = made
        seconds = result.seconds["denoise"]
        facts = result.info.get("acceleration", {})
        plain = (seconds, frames) if plain is None else plain
        progress.begin("likeness")
        rows.append(Row(
            name, seconds, seconds / result.info["steps"], plain[0] / seconds, facts.get("predicted_speed_up", 1.0),
            psnr(frames, plain[1]), mean_ssim(frames, plain[1]), facts.get("mean_density", 1.0),
            facts.get("flops_saved", 0.0),
        ))  # fmt: skip
        videos[name] = (frames * 255).round().byte().numpy()
    return rows, videos


def write(rows: list[Row], videos: dict[str, np.ndarray], arguments: Namespace, video: Video) -> None:
    """The four files, in the folder --output."""
    from .pictures import clip, plot  # matplotlib and av are not of the pack's requirements

    folder = arguments.output
    facts = {"given": _given(arguments, video), "rows": [row.facts() for row in rows]}
    (folder / "comparison.md").write_text(markdown(rows))
    (folder / "comparison.json").write_text(json.dumps(facts, indent=1, default=str, ensure_ascii=False) + "\n")
    plot(rows, folder / "comparison.png")
    titles = {row.setting: f"{row.setting}\n{', '.join(row.cells()[i] for i in (3, 5))}" for row in rows[1:]}
    clip({titles.get(name, name): video for name, video in videos.items()}, folder / "comparison.mp4", video.fps)


def _given(arguments: Namespace, video: Video) -> dict[str, Any]:
    """The arguments, and the model's own in the place of those that were not given."""
    left_out = ("run", "command", "output", "setting")
    given = {name: value for name, value in vars(arguments).items() if name not in left_out}
    return given | {
        "size": f"{video.size.width}x{video.size.height}", "frames": video.size.num_frames, "fps": video.fps,
        "steps": video.spec.steps, "shift": video.spec.shift, "guidance": video.spec.guidance_scale,
    }  # fmt: skip


def _made(
    arguments: Namespace, video: Video, settings: list[Setting], progress: Progress
) -> Iterator[tuple[str, tuple[Result, Tensor] | ValueError]]:
    """The plain video and that of each setting, or why the ranks refuse it: what sampling reported, and frames
    [T,H,W,3]. Raises ValueError where the plain one is refused."""
    empty = torch.zeros(video.form.latent_shape(video.size))
    jobs = [(PLAIN, AccelerationSpec()), *((one.name, one.spec) for one in settings)]
    with Runtime(parallel_of(arguments.parallel, arguments.ranks), arguments.device) as runtime:
        progress.say(f"{len(jobs)} videos of {video_options.said(video.size, video.spec)}; {_ranks(runtime)}")
        progress.begin("starting the ranks")
        runtime.start()
        positive, negative = (
            runtime.encode(video.encoder, text, on_progress=progress.on_progress).tensor
            for text in (arguments.prompt, arguments.negative)
        )
        for number, (name, acceleration) in enumerate(jobs, 1):
            progress.title(f"video {number} of {len(jobs)}, {name}")

            def sample() -> Result:
                return runtime.sample(
                    video.model, video.spec, empty, positive, negative, warm_up=True, acceleration=acceleration,
                    on_progress=progress.on_progress,
                )  # fmt: skip

            try:
                result = _fastest(arguments.repeats, sample)
            except ValueError as error:
                if name == PLAIN:
                    raise
                progress.say(f"video {number} of {len(jobs)}, {name}: refused")
                yield name, error
            else:
                progress.say(f"video {number} of {len(jobs)}, {name}: denoised in {result.seconds['denoise']:.1f} s")
                yield name, (result, runtime.decode(video.vae, result.tensor, on_progress=progress.on_progress).tensor)


def _ranks(runtime: Runtime) -> str:
    return f"{runtime.world_size} {'rank' if runtime.world_size == 1 else 'ranks'} on {runtime.device}"


def _fastest(repeats: int, sample: Callable[[], Result]) -> Result:
    """Of as many runs of one job, that with the shortest denoise loop."""
    return min((sample() for _ in range(repeats)), key=lambda result: result.seconds["denoise"])
