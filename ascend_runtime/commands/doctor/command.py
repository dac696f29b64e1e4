"""The command `doctor`: its arguments, the order of the checks, and their output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ...checkpoints.faults import printable
from ..cluster.checks import CLUSTER_CHECKS
from . import cards, comfyui, disks, limits, model_files, network, npu, packages, processes, table
from .findings import ERROR, Finding, worst
from .surroundings import Surroundings, kind_of

DEVICE_CHOICES = ("auto", "npu", "cuda", "cpu")
_EPILOG = """
exit status: 0 no error, maybe warnings; 1 an error; 2 an invalid argument; 130 interrupted"""

Check = Callable[[Surroundings], Iterator[Finding]]
_ON_CARDS: dict[str, tuple[tuple[str, tuple[Check, ...]], ...]] = {
    "npu": (("NPUs and CANN", npu.NPU_CHECKS), ("Cards", (cards.npus,)), ("Network", network.NETWORK_CHECKS)),
    "cuda": (("GPUs", (cards.nvidia,)),),
    "cpu": (),
}


def add_doctor_command(commands, summary: str) -> None:
    """Declares the command. commands: the result of argparse's add_subparsers. summary: a line of help."""
    parser = commands.add_parser(
        "doctor", help=summary, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Checks whether this host can run the pack: driver, cards, packages, limits, ComfyUI, models,\n"
                    "disks. Takes seconds, reads no weights, starts no rank, and ends no process.",
    )  # fmt: skip
    parser.add_argument("--device", choices=DEVICE_CHOICES, default="auto",
                        help="the devices that ranks will use (default: auto, the first kind that this host has)"
                        )  # fmt: skip
    parser.add_argument("--models", type=Path, nargs="+", default=(), metavar="FOLDER",
                        help="folders of models (default: those of the ComfyUI that the pack is in, or of COMFYUI_DIR)"
                        )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints what is found. Returns the exit status."""
    if missing := [str(folder) for folder in arguments.models if not folder.is_dir()]:
        named = ", ".join(printable(name) for name in missing)
        print(f"error: --models: {named} is not a folder that can be read. Give a folder of models.", file=sys.stderr)
        return 2
    around = Surroundings(kind_of(arguments.device, os.environ), tuple(arguments.models))
    groups = examine(around)
    if arguments.json:
        print(table.groups_as_json(around.kind, groups))
    else:
        table.print_table(around.kind, groups, sys.stdout)
    return 1 if worst(one for group in groups.values() for one in group) == ERROR else 0


def examine(around: Surroundings) -> dict[str, list[Finding]]:
    """What all checks find, by group."""
    imports = packages.Imports(around)
    groups = (
        *_ON_CARDS[around.kind],
        ("Host", (*limits.LIMIT_CHECKS, *processes.PROCESS_CHECKS)),
        ("ComfyUI and models", (*comfyui.COMFYUI_CHECKS, *model_files.MODEL_CHECKS)),
        ("Disks", disks.DISK_CHECKS),
        ("Several machines", CLUSTER_CHECKS),
        ("Python", (*packages.PACKAGE_CHECKS, imports.findings)),
    )
    return {name: [finding for check in checks for finding in check(around)] for name, checks in groups}
