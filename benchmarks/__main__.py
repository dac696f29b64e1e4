"""Runs benchmarks by name, prints a table, and writes one JSON object a line."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from .report import print_table, to_json

BENCHMARKS = ("transport", "warm")  # modules of this package, each with `run(quick: bool) -> Iterator[Row]`


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there, one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="few runs and small sizes: shows that it works, no more")
    arguments = parser.parse_args()
    rows = [row for name in arguments.names for row in import_module(f".{name}", __package__).run(arguments.quick)]
    print_table(rows)
    if arguments.json:
        arguments.json.write_text("".join(map(to_json, rows)))


if __name__ == "__main__":
    main()
