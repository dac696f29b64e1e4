"""Makes one video without accelerators and with each setting, and shows what each saves and changes."""

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
from ..progress import ProgressDisplay
from .settings import Setting, parallel_of, settings_of
from .table import PLAIN_VIDEO, ResultRow, markdown


@dataclass(frozen=True)
class ComparedVideo:
    """The video to compare, made once plain and once with each setting. spec: with the model's own values filled in."""

    model: DiffusionModelSpec
    encoder: TextEncoderSpec
    vae: VaeSpec
    form: VaeForm
    size: VideoSize
    spec: SampleSpec
    fps: float

    @classmethod
    def of(cls, arguments: Namespace) -> ComparedVideo:
        """Raises ValueError if the model cannot be read, or does not support such a video."""
        own = model_defaults(arguments.model, arguments.low_noise)
        vae = VaeSpec(path=arguments.vae or arguments.model)
        form = vae_form(vae.path)
        size = video_options.size_of(arguments, own.size, form.multiple)
        return cls(
            model=video_options.model_of(arguments),
            encoder=video_options.encoder_of(arguments),
            vae=vae,
            form=form,
            size=size,
            spec=own.fill(video_options.sampling_of(arguments, arguments.seed), pixels=size.width * size.height),
            fps=own.fps if arguments.fps is None else arguments.fps,
        )


def run(arguments: Namespace, progress: ProgressDisplay | None = None) -> int:
    """Compares, prints the table and writes the files. Returns 0 if all settings ran, 1 if any was rejected. If it
    raises (ValueError, OSError, KeyboardInterrupt), it writes nothing."""
    progress = progress or ProgressDisplay()
    settings = [setting for text in arguments.setting for setting in settings_of(text)]
    with _folder(arguments.output):
        try:
            video = ComparedVideo.of(arguments)
            with Runtime(parallel_of(arguments.parallel, arguments.ranks), arguments.device) as runtime:
                rows, frames = compare(runtime, arguments, video, settings, progress)
                given = _given(arguments, video, runtime)
        except (RankError, RankDied) as error:
            raise ValueError(str(error)) from error
        progress.title("")
        progress.begin("writing the clip")
        write_files(rows, frames, given, arguments.output, video.fps)
    progress.end()
    print(printable_lines(f"{markdown(rows)}\n{arguments.output}: comparison.md, .json, .png, .mp4"), flush=True)
    return 1 if any(row.refused for row in rows) else 0


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Creates the folder before the work, to fail early; removes it again if the work fails."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty, if others have written to it
            for folder in made:
                folder.rmdir()
        raise


def compare(
    runtime: Runtime, arguments: Namespace, video: ComparedVideo, settings: list[Setting], progress: ProgressDisplay
) -> tuple[list[ResultRow], dict[str, np.ndarray]]:
    """The rows of the plain video and each setting, and by name the frames of those that ran, uint8 [T,H,W,3]."""
    from .similarity import mean_ssim, psnr  # needs kornia, which is not a requirement of the pack

    rows, videos, plain = [], {}, None
    for name, made in _made(runtime, arguments, video, settings, progress):
        if isinstance(made, ValueError):
            rows.append(ResultRow(name, refused=str(made)))
            continue
        result, frames = made
        seconds = result.seconds["denoise"]
        facts = result.info.get("acceleration", {})
        plain = (seconds, frames) if plain is None else plain
        progress.begin("similarity")
        rows.append(ResultRow(
            name, seconds, seconds / result.info["steps"], plain[0] / seconds, facts.get("predicted_speed_up", 1.0),
            psnr(frames, plain[1]), mean_ssim(frames, plain[1]), facts.get("mean_density", 1.0),
            facts.get("flops_saved", 0.0),
        ))  # fmt: skip
        videos[name] = (frames * 255).round().byte().numpy()
    return rows, videos


def write_files(
    rows: list[ResultRow], videos: dict[str, np.ndarray], given: dict[str, Any], output: Path, fps: float
) -> None:
    """Writes the four files to the folder `output`: all of them, or none."""
    from .pictures import clip, plot  # needs matplotlib and av, which are not requirements of the pack

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


def _given(arguments: Namespace, video: ComparedVideo, runtime: Runtime) -> dict[str, Any]:
    """The arguments, with values filled in for those that were not given: the model's own, and the ranks."""
    omitted = ("run", "command", "output", "setting")
    given = {name: value for name, value in vars(arguments).items() if name not in omitted}
    return given | {
        "size": f"{video.size.width}x{video.size.height}", "frames": video.size.num_frames, "fps": video.fps,
        "steps": video.spec.steps, "shift": video.spec.shift, "guidance": video.spec.guidance_scale,
        "embedded_guidance": video.spec.embedded_guidance,
        "ranks": runtime.world_size, "device": runtime.device, "parallel": arguments.parallel or "auto",
    }  # fmt: skip


def _made(
    runtime: Runtime, arguments: Namespace, video: ComparedVideo, settings: list[Setting], progress: ProgressDisplay
) -> Iterator[tuple[str, tuple[Result, Tensor] | ValueError]]:
    """Yields the name and (sampling result, frames [T,H,W,3]) of the plain video and of each setting, or the error of a
    setting that the ranks reject. Raises ValueError if they reject the plain video."""
    empty = torch.zeros(video.form.latent_shape(video.size))
    jobs = [(PLAIN_VIDEO, AccelerationSpec()), *((one.name, one.spec) for one in settings)]
    ranks = video_options.counted(runtime.world_size, "rank")
    progress.say(f"{len(jobs)} videos of {video_options.summary(video.size, video.spec)}; {ranks} on {runtime.device}")
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
            if name == PLAIN_VIDEO:
                raise
            progress.say(f"{title}: rejected")
            yield name, error
        else:
            progress.say(f"{title}: denoised in {result.seconds['denoise']:.1f} s")
            yield name, (result, runtime.decode(video.vae, result.tensor, on_progress=progress.on_progress).tensor)


def _fastest(repeats: int, sample: Callable[[], Result]) -> Result:
    """Runs a job several times, and returns the result with the shortest denoise loop."""
    return min((sample() for _ in range(repeats)), key=lambda result: result.seconds["denoise"])
