"""Declares the commands' arguments, and checks them before a command imports torch, which takes seconds."""

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
from ..specs.models import MODEL_FORMATS, WEIGHT_DTYPES
from ..specs.presets import PRESETS, SPECS
from . import video_options
from .cluster import options as cluster_options
from .comparison import settings
from .downloading import options as download_options
from .plan import options as plan_options

SHARD_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
COMPARISON = ("kornia", "matplotlib", "av")  # packages for compare that are not requirements of the pack
EXIT_STATUS = """
exit status: 0 success; 1 an error, or an unusable part or setting; 2 an invalid argument, or a path that does not
exist; 130 interrupted"""


@dataclass(frozen=True)
class Command:
    """A command. summary: one line of help. module: has `run(arguments, progress)`; imported after the checks.

    declare: adds the arguments to a parser. check: raises ValueError for invalid arguments. begins: describes what the
    command will do, as a line of output.
    """

    summary: str
    module: str
    declare: Callable[[ArgumentParser], None]
    check: Callable[[Namespace], None]
    begins: Callable[[Namespace], str]


def _declare_inspect(parser: ArgumentParser) -> None:
    parser.description = "Shows what a model's folder or file contains, and whether it is complete. Reads no weights."
    parser.add_argument("path", metavar="PATH", help="a folder or a file")


def _declare_convert(parser: ArgumentParser) -> None:
    parser.description = "Writes a model in the layout of diffusers or MindSpeed-MM."
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a model's folder or file, in any format that the loaders support")
    add("target", metavar="TARGET", help="the folder to create")
    add("--to", choices=MODEL_FORMATS, required=True, help="the layout to write")
    add("--dtype", choices=WEIGHT_DTYPES, default=WEIGHT_DTYPES[0],
        help="dtype of the weights; weights that networks compute in fp32 are not rounded; keep (the default): "
        "each tensor's own dtype, bf16 for 8-bit tensors")  # fmt: skip
    add("--shard-size", default="5GB", metavar="SIZE", help="maximum size of diffusers' files (default: %(default)s)")


def _check_convert(arguments: Namespace) -> None:
    existing(arguments.source)
    require_free(Path(arguments.target).expanduser().absolute())
    if not SHARD_SIZE.fullmatch(arguments.shard_size):
        raise ValueError(f"--shard-size is {arguments.shard_size!r}. Give a number and a unit, such as 5GB.")


def _declare_calibrate(parser: ArgumentParser) -> None:
    parser.description = "Measures the calibration of TeaCache and MagCache for a model, and writes it next to it."
    add = parser.add_argument
    video_options.add_model(add)
    add("--prompt", action="append", metavar="TEXT",
        help="prompt of a video; repeat it to average over several (default: four built-in prompts)")  # fmt: skip
    add("--random-prompts", type=int, metavar="N", help="use N random embeddings instead, without a text encoder")
    video_options.add_video(add)
    video_options.add_ranks(add)
    add("--output", type=Path, metavar="FILE", help="output file (default: next to the model, where jobs read it)")


def _check_calibrate(arguments: Namespace) -> None:
    video_options.check_options(arguments)
    if arguments.random_prompts is not None and arguments.random_prompts < 1:
        raise ValueError(f"--random-prompts is {arguments.random_prompts}; give 1 or more.")
    encoder = arguments.random_prompts or arguments.text_encoder
    if encoder is None and not existing(arguments.model).is_dir():
        raise ValueError("A single model file has no text encoder. Give one with --text-encoder.")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise ValueError(f"--output is {arguments.output}, whose folder does not exist. Create it or give another.")


def _declare_compare(parser: ArgumentParser) -> None:
    parser.description = (
        "Makes one video without accelerators and with each setting, and shows what each saves and changes.\n\n"
        "Writes comparison.md, .json, .png (speed-up against PSNR) and .mp4 (the videos side by side). A setting is\n"
        "ACCELERATOR or ACCELERATOR=PRESET, optionally followed by :NAME=VALUE,NAME=VALUE. + combines accelerators;\n"
        "values separated by / give one setting each."
    )
    add = parser.add_argument
    video_options.add_model(add)
    add("--vae", metavar="PATH", help="the VAE's folder or file (default: in the model's folder)")
    add("--setting", action="append", required=True, metavar="SETTING",
        help=f"can be repeated; accelerators: {', '.join(SPECS)}; presets: {', '.join(PRESETS)}")  # fmt: skip
    add("--prompt", required=True, metavar="TEXT", help="the prompt")
    add("--negative", default="", metavar="TEXT", help="the negative prompt (default: empty)")
    video_options.add_video(add)
    add("--fps", type=float, help="frames per second of the clip (default: the model's own)")
    add("--seed", type=int, default=0, help="the seed (default: %(default)s)")
    add("--repeats", type=int, default=1, metavar="N",
        help="runs of each video; the fastest counts (for a busy machine; default: %(default)s)")  # fmt: skip
    video_options.add_ranks(add)
    add("--parallel", metavar="NAME=VALUE,...", help="the parallel plan, such as ulysses_degree=4,cfg_degree=2")
    add("--output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="output folder; files of an earlier comparison are replaced (default: %(default)s)")  # fmt: skip


def _check_compare(arguments: Namespace) -> None:
    missing = [name for name in COMPARISON if find_spec(name) is None]
    if missing:
        named = " and ".join(missing)
        raise ValueError(f"compare needs {named}, which this Python lacks. Run: pip install {' '.join(missing)}")
    video_options.check_options(arguments)
    video_options.sampling_of(arguments, arguments.seed)
    if arguments.repeats < 1:
        raise ValueError(f"--repeats is {arguments.repeats}; give 1 or more.")
    if arguments.fps is not None and not (math.isfinite(arguments.fps) and 0.01 <= arguments.fps <= 1000):
        raise ValueError(f"--fps is {arguments.fps:g}; it must be between 0.01 and 1000.")
    settings.parallel_of(arguments.parallel, arguments.ranks)
    _settings(arguments)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output is {arguments.output}, which is not a folder. Give another.")


def _settings(arguments: Namespace) -> list[settings.Setting]:
    return [setting for text in arguments.setting for setting in settings.settings_of(text)]


def _compare_begins(arguments: Namespace) -> str:
    count, repeats = len(_settings(arguments)), arguments.repeats
    times = f", each {repeats} times" if repeats > 1 else ""
    videos = "one setting" if count == 1 else f"{count} settings"
    return f"comparing the plain video of {arguments.model} with {videos}{times}"


def _declare_adopt(parser: ArgumentParser) -> None:
    parser.description = (
        "Swaps the loaders of a stock ComfyUI workflow for ours, whose work all ranks do, and writes a new file.\n\n"
        "Prints what was swapped, and which loaders stay as they are and why. Both formats of workflows are read."
    )
    add = parser.add_argument
    add("workflow", type=Path, metavar="WORKFLOW", help="workflow JSON, in UI or API format")
    add("--back", action="store_true", help="swap our loaders for core's, which gives the workflow as it was")
    add("--models", type=Path, metavar="FOLDER",
        help="ComfyUI's models folder, where files are looked up; their content decides whether the ranks can run them "
        "(default: their names decide)")  # fmt: skip
    add("--output", type=Path, metavar="FILE",
        help="output file, which must not exist (default: WORKFLOW with _ascend or _core in its name)")  # fmt: skip


def _check_adopt(arguments: Namespace) -> None:
    existing(arguments.workflow)
    if arguments.models is not None and not arguments.models.is_dir():
        raise ValueError(f"--models is {arguments.models}, which is not a folder. Give ComfyUI's folder of models.")


def _adopt_begins(arguments: Namespace) -> str:
    return f"swapping the loaders of {arguments.workflow} for " + ("core's" if arguments.back else "ours")


def _declare_explain(parser: ArgumentParser) -> None:
    parser.description = (
        "Shows what made a video: models, settings, plan, accelerators, operators, versions and times, which nodes\n"
        "have written into its metadata; and whether this host would make the same video."
    )
    parser.epilog = """
exit status: 0 the same video, at least within rounding; 1 another one, or that cannot be known; 2 no such metadata, or
an invalid argument"""
    add = parser.add_argument
    add("file", metavar="FILE", help="a video (MP4, WebM) or picture (PNG, WebP) that ComfyUI has saved")
    add("--models", action="append", metavar="FOLDER",
        help="a folder in which to look for the models; can be repeated (default: ComfyUI's)")  # fmt: skip
    add("--json", action="store_true", help="print JSON")


def _check_explain(arguments: Namespace) -> None:
    file = Path(arguments.file).expanduser()
    if not file.is_file():
        why = "is a folder" if file.is_dir() else "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"{arguments.file!r} {why}. Give a file that ComfyUI has saved.")
    for folder in arguments.models or ():
        if not existing(folder).is_dir():
            raise ValueError(f"--models is {folder}, which is not a folder. Give a folder of models.")


def _calibrate_begins(arguments: Namespace) -> str:
    return f"calibrating {arguments.model}"


COMMANDS = {
    "adopt": Command(
        "swap the loaders of a stock workflow, so that it runs on all ranks", ".commands.adoption.command",
        _declare_adopt, _check_adopt, _adopt_begins,
    ),
    "explain": Command(
        "show what made a video, and whether this host would make the same", ".commands.explanation.command",
        _declare_explain, _check_explain, lambda arguments: f"explaining {arguments.file}",
    ),
    "inspect": Command(
        "show what a model's folder or file contains", ".commands.inspection", _declare_inspect,
        lambda arguments: existing(arguments.path) and None, lambda arguments: f"inspecting {arguments.path}",
    ),
    "calibrate": Command(
        "measure the calibration of TeaCache and MagCache", ".commands.calibration", _declare_calibrate,
        _check_calibrate, _calibrate_begins,
    ),
    "compare": Command(
        "make one video with and without accelerators, side by side", ".commands.comparison.command", _declare_compare,
        _check_compare, _compare_begins,
    ),
    "convert": Command(
        "convert a model to diffusers' or MindSpeed-MM's layout", ".commands.conversion", _declare_convert,
        _check_convert,
        lambda arguments: f"converting {arguments.source} to {arguments.target}, in the layout of {arguments.to}",
    ),
    "cluster": Command(
        "make and show clusters, of machines that make one video together", ".commands.cluster.command",
        cluster_options.declare_cluster, cluster_options.check_cluster, cluster_options.begins_cluster,
    ),
    "download": Command(
        "download the files of a published model", ".commands.downloading.command", download_options.declare_download,
        download_options.check_download, download_options.begins_download,
    ),
    "plan": Command(
        "predict a job under each plan, and show which one is chosen", ".commands.plan.command", plan_options.declare,
        plan_options.check_plan, plan_options.begins,
    ),
}  # fmt: skip


def add_command(commands, name: str) -> None:
    """Declares a command. commands: the result of argparse's add_subparsers."""
    command = COMMANDS[name]
    parser = commands.add_parser(name, help=command.summary, epilog=EXIT_STATUS,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    command.declare(parser)
