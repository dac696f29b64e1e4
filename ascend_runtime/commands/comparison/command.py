"""Makes one video as it is and with each setting of accelerators, and shows what that saves and changes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.faults import printable_lines
from ...client.group import RankDied
from ...client.runtime import Runtime
from ...client.submission import RankError, Result
from ...recognition.defaults import model_defaults
from ...recognition.layout import vae_form
from ...specs import AccelerationSpec, DiffusionModelSpec, SampleSpec, TextEncoderSpec, VaeForm, VaeSpec, VideoSize
from .. import video_options
from ..progress import Progress
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
    with _folder(arguments.output):
        try:
            video = Video.of(arguments)
            with Runtime(parallel_of(arguments.parallel, arguments.ranks), arguments.device) as runtime:
                rows, frames = compare(runtime, arguments, video, settings, progress)
                given = _given(arguments, video, runtime)
        except (RankError, RankDied) as error:
            raise ValueError(str(error)) from error
        progress.title("")
        progress.begin("writing the clip")
        write(rows, frames, given, arguments.output, video.fps)
    progress.end()
    print(printable_lines(f"{markdown(rows)}\n{arguments.output}: comparison.md, .json, .png, .mp4"), flush=True)
    return 1 if any(row.refused for row in rows) else 0


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes the folder, rather now than after an hour; where that hour ends otherwise, what was made is removed."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # others may have put something there meanwhile
            for folder in made:
                folder.rmdir()
        raise


def compare(
    runtime: Runtime, arguments: Namespace, video: Video, settings: list[Setting], progress: Progress
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for the plain video and each setting, and by name the frames of those that ran, uint8 [T,H,W,3]."""
    from .likeness import mean_ssim, psnr  # kornia is not of the pack's requirements

    rows, videos, plain = [], {}, None
    for name, made in _made(runtime, arguments, video, settings, progress):
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


def write(
    rows: list[Row], videos: dict[str, np.ndarray], given: dict[str, Any], output: Path, fps: float
) -> None:
    """The four files, in the folder `output`: all of them, or none."""
    from .pictures import clip, plot  # matplotlib and av are not of the pack's requirements

    facts = {"given": given, "rows": [row.facts() for row in rows]}
    titles = {row.setting: f"{row.setting}\n{', '.join(row.cells()[i] for i in (3, 5))}" for row in rows[1:]}
    with TemporaryDirectory(prefix=".comparison-", dir=output) as made:
        folder = Path(made)
        (folder / "comparison.md").write_text(markdown(rows))
        (folder / "comparison.json").write_text(json.dumps(facts, indent=1, default=str, ensure_ascii=False) + "\n")
        plot(rows, folder / "comparison.png")
        clip({titles.get(name, name): video for name, video in videos.items()}, folder / "comparison.mp4", fps)
        for file in folder.iterdir():
            file.replace(output / file.name)


def _given(arguments: Namespace, video: Video, runtime: Runtime) -> dict[str, Any]:
    """The arguments, and in the place of those that were not given what was taken: the model's own, and the ranks."""
    left_out = ("run", "command", "output", "setting")
    given = {name: value for name, value in vars(arguments).items() if name not in left_out}
    return given | {
        "size": f"{video.size.width}x{video.size.height}", "frames": video.size.num_frames, "fps": video.fps,
        "steps": video.spec.steps, "shift": video.spec.shift, "guidance": video.spec.guidance_scale,
        "ranks": runtime.world_size, "device": runtime.device, "parallel": arguments.parallel or "auto",
    }  # fmt: skip


def _made(
    runtime: Runtime, arguments: Namespace, video: Video, settings: list[Setting], progress: Progress
) -> Iterator[tuple[str, tuple[Result, Tensor] | ValueError]]:
    """The plain video and that of each setting, or why the ranks refuse it: what sampling reported, and frames
    [T,H,W,3]. Raises ValueError where the plain one is refused."""
    empty = torch.zeros(video.form.latent_shape(video.size))
    jobs = [(PLAIN, AccelerationSpec()), *((one.name, one.spec) for one in settings)]
    ranks = video_options.counted(runtime.world_size, "rank")
    progress.say(f"{len(jobs)} videos of {video_options.said(video.size, video.spec)}; {ranks} on {runtime.device}")
    progress.begin("starting the ranks")
    runtime.start()
    positive, negative = (
        runtime.encode(video.encoder, text, on_progress=progress.on_progress).conditioning
        for text in (arguments.prompt, arguments.negative)
    )
    sample = partial(
        runtime.sample, video.model, video.spec, empty, positive, negative, warm_up=True,
        on_progress=progress.on_progress,
    )  # fmt: skip
    for number, (name, acceleration) in enumerate(jobs, 1):
        title = f"video {number} of {len(jobs)}, {name}"
        progress.title(title)
        try:
            result = _fastest(arguments.repeats, partial(sample, acceleration=acceleration))
        except ValueError as error:
            if name == PLAIN:
                raise
            progress.say(f"{title}: refused")
            yield name, error
        else:
            progress.say(f"{title}: denoised in {result.seconds['denoise']:.1f} s")
            yield name, (result, runtime.decode(video.vae, result.tensor, on_progress=progress.on_progress).tensor)


def _fastest(repeats: int, sample: Callable[[], Result]) -> Result:
    """Of as many runs of one job, that with the shortest denoise loop."""
    return min((sample() for _ in range(repeats)), key=lambda result: result.seconds["denoise"])
