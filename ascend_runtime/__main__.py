"""`python -m ascend_runtime COMMAND`: the commands of the pack, each declared in its own module."""

import argparse
import sys
from importlib import import_module

COMMANDS = {  # by name: its module, which is imported if it is asked for, as torch comes with some; what it does
    "queue": (".headless.queue", "run a workflow for many prompts on any ComfyUI"),
    "inspect": (".inspection", "say what a model's folder or file holds"),
    "calibrate": (".calibration", "find out what TeaCache and MagCache have to know of a model"),
    "compare": (".comparison.command", "make one video with and without accelerators, side by side"),
    "convert": (".conversion", "write a model anew, as diffusers or MindSpeed-MM keep it"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ascend_runtime", description="Ascend Video's commands.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, does) in COMMANDS.items():
        if name in sys.argv[1:2]:
            import_module(module, __package__).add_command(commands, does)
        else:
            commands.add_parser(name, help=does)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
