"""Runs benchmarks by name, prints a table, and writes one JSON object per line."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Iterator

from .report import Row, print_table, to_json

# Modules of this package, each with `run(quick: bool) -> Iterator[Row]`.
BENCHMARKS = ("transport", "warm", "ascend", "scaling", "load", "vae", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures, one JSON object per line")
    parser.add_argument("--quick", action="store_true", help="few runs and small sizes, to show that it works")
    parser.add_argument("--models", type=Path, metavar="DIR", help="ascend: the folder that holds the published models")
    arguments = parser.parse_args()
    if arguments.models and "ascend" not in arguments.names:
        parser.error("only ascend has --models")
    rows = []
    try:
        with arguments.json.open("w") if arguments.json else nullcontext() as file:
            for row in _measure(arguments):
                rows.append(row)
                if file:
                    print(to_json(row), end="", file=file, flush=True)
    finally:
        print_table(rows)


def _measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for name in arguments.names:
        options = {"models": arguments.models} if name == "ascend" else {}
        yield from import_module(f".{name}", __package__).run(arguments.quick, **options)


if __name__ == "__main__":
    main()
