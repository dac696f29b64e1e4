"""The commands' arguments: declared, and checked before a command imports torch, which takes seconds."""

from __future__ import annotations

import argparse
import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..checkpoints.paths import existing
from ..checkpoints.writing.unfinished import require_free
from ..specs.models import FORMATS, WEIGHT_DTYPES
from ..specs.presets import PRESETS, SPECS
from . import video_options
from .comparison import settings

SHARD_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
COMPARISON = ("kornia", "matplotlib", "av")  # what compare needs besides the pack's own requirements
RESULTS = """
exit status: 0 done; 1 refused, or something in it was; 2 an argument is wrong, or a path does not exist; 130
interrupted"""


@dataclass(frozen=True)
class Command:
    """does: in a line of help. module: has `run(arguments, progress)`, and is imported when all else is known.

    declare: adds the arguments to a parser. check: raises ValueError for what is wrong with them. begins: what the
    command is about to do, in words.
    """

    does: str
    module: str
    declare: Callable[[ArgumentParser], None]
    check: Callable[[Namespace], None]
    begins: Callable[[Namespace], str]


def _declare_inspect(parser: ArgumentParser) -> None:
    parser.description = "Says what a model's folder or file holds, and whether it is whole. Reads no weight."
    parser.add_argument("path", metavar="PATH", help="a folder or a file")


def _declare_convert(parser: ArgumentParser) -> None:
    parser.description = "Writes a model as diffusers or MindSpeed-MM keep it."
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a model's folder or file, of any kind that the loaders take")
    add("target", metavar="TARGET", help="the folder to make")
    add("--to", choices=FORMATS, required=True, help="the layout to write")
    add("--dtype", choices=WEIGHT_DTYPES, default=WEIGHT_DTYPES[0],
        help="of the weights; what the networks compute in fp32 is not rounded; keep (the default): "
        "that of each tensor, bf16 for one of 8 bits")  # fmt: skip
    add("--shard-size", default="5GB", metavar="SIZE", help="of diffusers' files (default: %(default)s)")


def _check_convert(arguments: Namespace) -> None:
    existing(arguments.source)
    require_free(Path(arguments.target).expanduser().absolute())
    if not SHARD_SIZE.fullmatch(arguments.shard_size):
        raise ValueError(f"--shard-size is {arguments.shard_size!r}. Give a number and a unit, such as 5GB.")


def _declare_calibrate(parser: ArgumentParser) -> None:
    parser.description = "Finds out what TeaCache and MagCache have to know of a model, and writes that next to it."
    add = parser.add_argument
    video_options.add_model(add)
    add("--prompt", action="append", metavar="TEXT",
        help="of a video to make; several are averaged (default: four of this command's own)")  # fmt: skip
    add("--random-prompts", type=int, metavar="N", help="N random embeddings instead, without an encoder")
    video_options.add_video(add)
    video_options.add_ranks(add)
    add("--output", type=Path, metavar="FILE", help="(default: next to the model, where jobs look for it)")


def _check_calibrate(arguments: Namespace) -> None:
    video_options.check(arguments)
    if arguments.random_prompts is not None and arguments.random_prompts < 1:
        raise ValueError(f"--random-prompts is {arguments.random_prompts}; give 1 or more.")
    encoder = arguments.random_prompts or arguments.text_encoder
    if encoder is None and not existing(arguments.model).is_dir():
        raise ValueError("A file of a model has no text encoder next to it: give one with --text-encoder.")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise ValueError(f"--output is {arguments.output}, whose folder does not exist. Make it, or name another file.")


def _declare_compare(parser: ArgumentParser) -> None:
    parser.description = (
        "Makes one video as it is and with each setting of accelerators, and shows what that saves and changes.\n\n"
        "Writes comparison.md, .json, .png (speed-up against PSNR) and .mp4 (the videos side by side). A setting is\n"
        "ACCELERATOR, ACCELERATOR=PRESET or either with :NAME=VALUE,NAME=VALUE; + joins two, and / between values\n"
        "makes one setting of each."
    )
    add = parser.add_argument
    video_options.add_model(add)
    add("--vae", metavar="PATH", help="a folder or a file (default: that in the model's folder)")
    add("--setting", action="append", required=True, metavar="SETTING",
        help=f"accelerators: {', '.join(SPECS)}; presets: {', '.join(PRESETS)}. One or more")  # fmt: skip
    add("--prompt", required=True, metavar="TEXT", help="of the video")
    add("--negative", default="", metavar="TEXT", help="the negative prompt (default: an empty one)")
    video_options.add_video(add)
    add("--fps", type=float, help="of the clip (default: the model's own)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--repeats", type=int, default=1, metavar="N",
        help="of each video, of which the fastest counts, for a busy machine (default: %(default)s)")  # fmt: skip
    video_options.add_ranks(add)
    add("--parallel", metavar="NAME=VALUE,...", help="how they share the video, as ulysses_degree=4,cfg_degree=2")
    add("--output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="where the four files go, over those of an earlier comparison (default: %(default)s)")  # fmt: skip


def _check_compare(arguments: Namespace) -> None:
    missing = [name for name in COMPARISON if find_spec(name) is None]
    if missing:
        named = " and ".join(missing)
        raise ValueError(f"compare needs {named}, which this Python lacks: pip install {' '.join(missing)}")
    video_options.check(arguments)
    video_options.sampling_of(arguments, arguments.seed)
    if arguments.repeats < 1:
        raise ValueError(f"--repeats is {arguments.repeats}; give 1 or more.")
    if arguments.fps is not None and not (math.isfinite(arguments.fps) and 0.01 <= arguments.fps <= 1000):
        raise ValueError(f"--fps is {arguments.fps:g}; it must lie between 0.01 and 1000.")
    settings.parallel_of(arguments.parallel, arguments.ranks)
    _settings(arguments)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output is {arguments.output}, which is no folder. Name another.")


def _settings(arguments: Namespace) -> list[settings.Setting]:
    return [setting for text in arguments.setting for setting in settings.settings_of(text)]


def _compare_begins(arguments: Namespace) -> str:
    count, repeats = len(_settings(arguments)), arguments.repeats
    times = f", each {repeats} times" if repeats > 1 else ""
    videos = "one setting" if count == 1 else f"{count} settings"
    return f"comparing the plain video of {arguments.model} with {videos}{times}"


def _calibrate_begins(arguments: Namespace) -> str:
    return f"calibrating {arguments.model}"


COMMANDS = {
    "inspect": Command(
        "say what a model's folder or file holds", ".commands.inspection", _declare_inspect,
        lambda arguments: existing(arguments.path) and None, lambda arguments: f"looking at {arguments.path}",
    ),
    "calibrate": Command(
        "find out what TeaCache and MagCache have to know of a model", ".commands.calibration", _declare_calibrate,
        _check_calibrate, _calibrate_begins,
    ),
    "compare": Command(
        "make one video with and without accelerators, side by side", ".commands.comparison.command", _declare_compare,
        _check_compare, _compare_begins,
    ),
    "convert": Command(
        "write a model as diffusers or MindSpeed-MM keep it", ".commands.conversion", _declare_convert, _check_convert,
        lambda arguments: f"converting {arguments.source} into {arguments.target}, in the layout of {arguments.to}",
    ),
}  # fmt: skip


def add_command(commands, name: str) -> None:
    """Declares a command; `commands` is what argparse's add_subparsers returned."""
    command = COMMANDS[name]
    parser = commands.add_parser(name, help=command.does, epilog=RESULTS,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    command.declare(parser)
