"""`python -m ascend_runtime COMMAND`: the commands of the pack; `ascend-video COMMAND` where it was installed by pip.

`doctor` also runs where the pack's requirements are not installed, so nothing here imports them before it.

Arguments are parsed and checked first. Then the command prints what it does, and only then is torch imported.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from .checkpoints.faults import printable_lines

if TYPE_CHECKING:
    from .commands.progress import ProgressDisplay

INSTALLED = "ascend-video"  # pyproject.toml's [project.scripts]
INTERRUPTED = "interrupted; nothing was written"
QUEUE = "run a workflow for many prompts on any ComfyUI"
DOCTOR = "find what is wrong with this host, its packages, cards and models"


def main() -> int:
    """Returns the exit status."""
    _open_closed_streams()
    parser = _parser()
    if not sys.argv[1:]:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a path may not be valid text; stderr escapes such bytes by default
        sys.stdout.reconfigure(errors="backslashreplace")
    _on_interrupt(signal.default_int_handler)
    try:
        status = arguments.run(arguments) if arguments.command in ("queue", "doctor") else _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _open_closed_streams() -> None:
    """Opens /dev/null for closed standard streams (`>&-`), or the next opened file would get their descriptors."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # also for the ranks
            setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))


class _Parser(argparse.ArgumentParser):
    """Escapes control characters in errors, which quote arguments."""

    def error(self, message: str) -> NoReturn:
        super().error(printable_lines(message))


def _parser() -> argparse.ArgumentParser:
    prog = INSTALLED if Path(sys.argv[0]).name == INSTALLED else "python -m ascend_runtime"
    parser = _Parser(prog=prog, description="Ascend Video's commands.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    if "doctor" in sys.argv[1:2]:
        import_module(".commands.doctor.command", __package__).add_doctor_command(commands, DOCTOR)
        return parser
    commands.add_parser("doctor", help=DOCTOR)
    if "queue" in sys.argv[1:2]:
        import_module(".commands.queue.command", __package__).add_queue_command(commands, QUEUE)
    else:
        commands.add_parser("queue", help=QUEUE)
    from .commands.command_line import COMMANDS, add_command

    for name in COMMANDS:
        add_command(commands, name)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from .commands.command_line import COMMANDS
    from .commands.progress import ProgressDisplay

    command, progress = COMMANDS[arguments.command], ProgressDisplay()
    try:
        command.check(arguments)
    except (ValueError, OSError) as error:
        progress.refuse(error)
        return 2
    with progress:
        progress.say(command.begins(arguments))
        progress.begin("starting")
        try:
            return _imported(command.module, progress).run(arguments, progress)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            progress.refuse(error)
            return 1


def _imported(name: str, progress: ProgressDisplay) -> ModuleType:
    """Imports a command's module. An interrupt during the import ends the process at once, as an exception inside
    torch's initialisation aborts it."""

    def leave(*_) -> None:
        progress.end()
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)

    _on_interrupt(leave)
    try:
        return import_module(name, __package__)
    finally:
        _on_interrupt(signal.default_int_handler)


def _on_interrupt(handler: Callable) -> None:
    """Handles SIGTERM like SIGINT, as some shells ignore SIGINT for background processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
