"""`python -m ascend_runtime COMMAND`: the commands of the pack, each declared in its own module."""

import argparse
import sys

from .headless import queue


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ascend_runtime", description="Ascend Video's commands.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    queue.add_command(commands)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
