"""`python -m ascend_runtime COMMAND`: the commands of the pack.

Arguments are read and checked first, then the command says what it is about to do, and torch is imported after that.
"""

import argparse
import os
import signal
import sys
from importlib import import_module

QUEUE = "run a workflow for many prompts on any ComfyUI"


def main() -> int:
    """Returns the exit status."""
    parser = _parser()
    if not sys.argv[1:]:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a path may have bytes that are no text; standard error escapes them itself
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):  # `kill` means what Ctrl+C does, which some shells ignore
        signal.signal(number, signal.default_int_handler)
    try:
        status = arguments.run(arguments) if arguments.command == "queue" else _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    from .command_line import COMMANDS, add_command

    parser = argparse.ArgumentParser(prog="python -m ascend_runtime", description="Ascend Video's commands.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    if "queue" in sys.argv[1:2]:
        import_module(".headless.queue", __package__).add_command(commands, QUEUE)
    else:
        commands.add_parser("queue", help=QUEUE)
    for name in COMMANDS:
        add_command(commands, name)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from .command_line import COMMANDS
    from .progress import Progress

    command = COMMANDS[arguments.command]
    try:
        command.check(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with Progress() as progress:
        progress.say(command.begins(arguments))
        progress.begin("starting")
        try:
            return import_module(command.module, __package__).run(arguments, progress)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            progress.end()
            print(f"error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
