"""`python -m ascend_runtime COMMAND`: the commands of the pack.

Arguments are read and checked first, then the command says what it is about to do, and torch is imported after that.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from .checkpoints.faults import printable_lines
from .commands.progress import Progress

INTERRUPTED = "interrupted; nothing was written"
QUEUE = "run a workflow for many prompts on any ComfyUI"


def main() -> int:
    """Returns the exit status."""
    _open_closed_streams()
    parser = _parser()
    if not sys.argv[1:]:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a path may have bytes that are no text; standard error escapes them itself
        sys.stdout.reconfigure(errors="backslashreplace")
    _on_interrupt(signal.default_int_handler)
    try:
        status = arguments.run(arguments) if arguments.command == "queue" else _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _open_closed_streams() -> None:
    """`>&-` closes a stream. Python has None for it then, and the next file that is opened gets its number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # the ranks' too
            setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))


class _Parser(argparse.ArgumentParser):
    """Its errors quote arguments, which may hold what a terminal obeys."""

    def error(self, message: str) -> NoReturn:
        super().error(printable_lines(message))


def _parser() -> argparse.ArgumentParser:
    from .commands.command_line import COMMANDS, add_command

    parser = _Parser(prog="python -m ascend_runtime", description="Ascend Video's commands.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    if "queue" in sys.argv[1:2]:
        import_module(".commands.queue.command", __package__).add_command(commands, QUEUE)
    else:
        commands.add_parser("queue", help=QUEUE)
    for name in COMMANDS:
        add_command(commands, name)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from .commands.command_line import COMMANDS

    command, progress = COMMANDS[arguments.command], Progress()
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


def _imported(name: str, progress: Progress) -> ModuleType:
    """A command's module. An interrupt meanwhile ends the process at once: nothing has begun yet, and torch's own code
    aborts where an exception meets it."""

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
    """`kill` means what Ctrl+C does, which some shells ignore."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
