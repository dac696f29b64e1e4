"""Runs benchmarks by name, prints a table, and writes one JSON object per line.

`ascend` also prints a report of the machine, the figures, and what was not measured: a text to send.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Iterator

from .report import Row, print_table, to_json

# Modules of this package, each with `run(quick: bool) -> Iterator[Row]`.
BENCHMARKS = ("transport", "warm", "ascend", "scaling", "load", "vae", "accelerate", "stock", "plan")
OPTIONS = {"ascend": ("models", "only", "report"), "accelerate": ("family",)}  # those that only one of them has
FAMILIES = ("wan", "hunyuan_video")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures, one JSON object per line")
    parser.add_argument("--quick", action="store_true", help="few runs and small sizes, to show that it works")
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0],
                        help="accelerate: the models' family (default: %(default)s)")  # fmt: skip
    parser.add_argument("--hosts", action="store_true",
                        help="transport: to ranks on other hosts, which are network namespaces")  # fmt: skip
    parser.add_argument("--published", action="store_true",
                        help="plan: predict published tables instead of jobs on this machine")  # fmt: skip
    ascend = parser.add_argument_group("ascend")
    ascend.add_argument("--models", type=Path, metavar="DIR", help="the folder that holds the published models")
    ascend.add_argument("--only", metavar="TEXT", help="of the published workloads, those whose name contains TEXT")
    ascend.add_argument("--report", type=Path, metavar="FILE", help="file for the report, in Markdown")
    arguments = parser.parse_args()
    if "ascend" not in arguments.names and (arguments.models or arguments.only or arguments.report):
        parser.error("only ascend has --models, --only and --report")
    if "accelerate" not in arguments.names and arguments.family != FAMILIES[0]:
        parser.error("only accelerate has --family")
    if "plan" not in arguments.names and arguments.published:
        parser.error("only plan has --published")
    if "transport" not in arguments.names and arguments.hosts:
        parser.error("only transport has --hosts")
    rows = []
    try:
        with arguments.json.open("w") if arguments.json else nullcontext() as file:
            for row in _measure(arguments):
                rows.append(row)
                if file:
                    print(to_json(row), end="", file=file, flush=True)
    finally:
        own = ("ascend.", "plan.published.")  # those that print their own tables
        print_table(row for row in rows if not row.name.startswith(own))


def _measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for name in arguments.names:
        options = {key: getattr(arguments, key) for key in OPTIONS.get(name, ())}
        yield from import_module(f".{_module(name, arguments)}", __package__).run(arguments.quick, **options)


def _module(name: str, arguments: argparse.Namespace) -> str:
    if name == "plan" and arguments.published:
        return "published_plans"
    return "transport_hosts" if name == "transport" and arguments.hosts else name


if __name__ == "__main__":
    main()
