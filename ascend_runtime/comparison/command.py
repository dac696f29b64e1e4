"""Makes one video as it is and with each setting of accelerators, and shows what that saves and changes.

Writes comparison.md, .json, .png (speed-up against PSNR) and .mp4 (the videos side by side). A setting is
ACCELERATOR, ACCELERATOR=PRESET or either with :NAME=VALUE,NAME=VALUE; + joins two, and / between values makes one
setting of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..acceleration import AccelerationSpec
from ..checkpoints.layout import vae_form
from ..client import Runtime
from ..launcher import RankDied
from ..presets import PRESETS, SPECS
from ..specs import DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize
from ..submission import OnProgress, RankError, Result
from .settings import Setting, pairs_of, settings_of, value_of
from .table import PLAIN, Row, markdown

NEEDED = ("kornia", "matplotlib", "av")  # beside the pack's own requirements


def add_command(commands, does: str) -> None:
    parser = commands.add_parser("compare", help=does, description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="a text-to-video model's folder or file")
    add("--setting", action="append", required=True, metavar="SETTING",
        help=f"accelerators: {', '.join(SPECS)}; presets: {', '.join(PRESETS)}. One or more")  # fmt: skip
    add("--prompt", required=True, metavar="TEXT")
    add("--negative", default="", metavar="TEXT")
    add("--low-noise", metavar="PATH", help="the low-noise expert, where that lies elsewhere")
    add("--text-encoder", metavar="PATH", help="a folder or a file (default: that in the model's folder)")
    add("--vae", metavar="PATH", help="a folder or a file (default: that in the model's folder)")
    add("--dtype", default="auto", help="of the model (default: float32 on a CPU, else bfloat16)")
    add("--size", default="832x480", metavar="WIDTHxHEIGHT", help="(default: %(default)s)")
    add("--frames", type=int, default=81, help="4n+1 (default: %(default)s)")
    add("--fps", type=float, default=16, help="of the clip (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--steps", type=int, help="(default: the model's own, as for the next two)")
    add("--shift", type=float)
    add("--guidance", type=float)
    add("--repeats", type=int, default=1, metavar="N",
        help="of each video, of which the fastest counts, for a busy machine (default: %(default)s)")  # fmt: skip
    add("--ranks", type=int, default=0, help="(default: one a device)")
    add("--parallel", metavar="NAME=VALUE,...", help="how they share the video, as ulysses_degree=4,cfg_degree=2")
    add("--device", default="auto", help="npu, cuda or cpu (default: the first of these that is there)")
    add("--output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="where the four files go, over those of an earlier comparison (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints the table, writes the files. Returns 0 where all settings ran, 1 where one or all were refused,
    130 where it was interrupted."""
    try:
        _require_packages()
        if arguments.repeats < 1:
            raise ValueError(f"--repeats is {arguments.repeats}; give 1 or more.")
        settings = [setting for text in arguments.setting for setting in settings_of(text)]
        arguments.output.mkdir(parents=True, exist_ok=True)  # rather now than after an hour
        rows, videos = compare(arguments, settings)
        write(rows, videos, arguments)
    except (ValueError, OSError, RankError, RankDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{markdown(rows)}\n{arguments.output}: comparison.md, .json, .png, .mp4")
    return 1 if any(row.refused for row in rows) else 0


def compare(arguments: argparse.Namespace, settings: list[Setting]) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for the plain video and each setting, and by name the frames of those that ran, uint8 [T,H,W,3]."""
    from .likeness import mean_ssim, psnr  # kornia is not of the pack's requirements

    rows, videos, plain = [], {}, None
    for name, made in _made(arguments, settings):
        if isinstance(made, ValueError):
            rows.append(Row(name, refused=str(made)))
            continue
        result, frames = made
        seconds = result.seconds["denoise"]
        facts = result.info.get("acceleration", {})
        plain = (seconds, frames) if plain is None else plain
        rows.append(Row(
            name, seconds, seconds / result.info["steps"], plain[0] / seconds, facts.get("predicted_speed_up", 1.0),
            psnr(frames, plain[1]), mean_ssim(frames, plain[1]), facts.get("mean_density", 1.0),
            facts.get("flops_saved", 0.0),
        ))  # fmt: skip
        videos[name] = (frames * 255).round().byte().numpy()
    return rows, videos


def write(rows: list[Row], videos: dict[str, np.ndarray], arguments: argparse.Namespace) -> None:
    """The four files, in the folder --output."""
    from .pictures import clip, plot  # matplotlib and av are not of the pack's requirements

    folder = arguments.output
    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "output", "setting")}
    facts = {"given": given, "rows": [row.facts() for row in rows]}
    (folder / "comparison.md").write_text(markdown(rows))
    (folder / "comparison.json").write_text(json.dumps(facts, indent=1, default=str, ensure_ascii=False) + "\n")
    plot(rows, folder / "comparison.png")
    titles = {row.setting: f"{row.setting}\n{', '.join(row.cells()[i] for i in (3, 5))}" for row in rows[1:]}
    clip({titles.get(name, name): video for name, video in videos.items()}, folder / "comparison.mp4", arguments.fps)


def _made(
    arguments: argparse.Namespace, settings: list[Setting]
) -> Iterator[tuple[str, tuple[Result, Tensor] | ValueError]]:
    """The plain video and that of each setting, or why the ranks refuse it: what sampling told, and frames [T,H,W,3].
    Raises ValueError where the plain one is refused."""
    model = DiffusionModelSpec(path=arguments.model, low_noise_path=arguments.low_noise, dtype=arguments.dtype)
    encoder = TextEncoderSpec(path=arguments.text_encoder or arguments.model)
    vae = VaeSpec(path=arguments.vae or arguments.model)
    spec = SampleSpec(seed=arguments.seed, steps=arguments.steps, shift=arguments.shift,
                      guidance_scale=arguments.guidance)  # fmt: skip
    empty = _empty(arguments, vae.path)
    with Runtime(_parallel(arguments), arguments.device) as runtime:
        positive, negative = (runtime.encode(encoder, text).tensor for text in (arguments.prompt, arguments.negative))
        for name, acceleration in [(PLAIN, AccelerationSpec()), *((one.name, one.spec) for one in settings)]:
            try:
                result = _fastest(arguments.repeats, name, lambda on_progress: runtime.sample(
                    model, spec, empty, positive, negative, warm_up=True, acceleration=acceleration,
                    on_progress=on_progress,
                ))  # fmt: skip
            except ValueError as error:
                if name == PLAIN:
                    raise
                yield name, error
            else:
                yield name, (result, runtime.decode(vae, result.tensor).tensor)


def _fastest(repeats: int, name: str, sample: Callable[[OnProgress], Result]) -> Result:
    """Of as many runs of one job, that with the shortest denoise loop."""
    results = []
    for _ in range(repeats):
        with tqdm(desc=name, unit="step", disable=None) as bar:
            results.append(sample(lambda stage, step, total: _show(bar, stage, step, total)))
    return min(results, key=lambda result: result.seconds["denoise"])


def _show(bar: tqdm, stage: str, step: int, total: int) -> None:
    if stage == "denoise":
        bar.total, bar.n = total, step
        bar.refresh()


def _empty(arguments: argparse.Namespace, vae: str) -> Tensor:
    """The latent to start from, zeros. Raises ValueError."""
    width, _, height = arguments.size.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"--size is {arguments.size!r}; give WIDTHxHEIGHT, such as 832x480.")
    size = VideoSize(width=int(width), height=int(height), num_frames=arguments.frames)
    return torch.zeros(vae_form(vae).latent_shape(size))


def _parallel(arguments: argparse.Namespace) -> ParallelSpec:
    pairs = pairs_of(arguments.parallel) if arguments.parallel else []
    given = {name: value_of(ParallelSpec, name, text) for name, text in pairs}
    return ParallelSpec(**{"ranks": arguments.ranks, **given})


def _require_packages() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        named = " and ".join(missing)
        raise ValueError(f"compare needs {named}, which this Python lacks: pip install {' '.join(missing)}")
