"""Prints findings as a table for people, or as JSON for programs."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TextIO

from ...checkpoints.faults import printable
from .findings import ERROR, FINDING_LEVELS, OK, WARNING, Finding, worst

_COLOURS = {OK: "32", WARNING: "33", ERROR: "31"}
NARROWEST, _WIDEST = 40, 120
_LEVEL_WIDTH, _CHECK_WIDTH = 9, 22
_FORMAT = 1  # of the JSON; grows if a key changes its meaning

Groups = Mapping[str, list[Finding]]


def print_table(kind: str, groups: Groups, out: TextIO) -> None:
    """Writes a table as wide as the terminal, in colours only on one."""
    terminal = out.isatty()
    width = min(_WIDEST, max(NARROWEST, shutil.get_terminal_size((100, 24)).columns))
    for name, findings in groups.items():
        if findings:
            print(f"\n{name}", file=out)
        for finding in findings:
            for line in _lines(finding, width, terminal):
                print(line, file=out)
    print("", *_wrapped(summary_line(kind, groups), width), sep="\n", file=out)


def _lines(finding: Finding, width: int, colours: bool) -> Iterator[str]:
    indent = " " * (_LEVEL_WIDTH + _CHECK_WIDTH + 2) if width >= 80 else " " * 4
    level = finding.level.ljust(_LEVEL_WIDTH)
    if colours:
        level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
    lead = f"  {level}{printable(finding.check).ljust(_CHECK_WIDTH)}"
    text = f"{finding.code}: {finding.found}" if finding.code else finding.found
    lines = _wrapped(text, width - len(indent))
    if width >= 80:
        yield f"{lead}{lines[0]}".rstrip()
        lines = lines[1:]
    else:
        yield lead.rstrip()
    yield from (indent + line for line in lines)
    if finding.cure:
        yield from (indent + line for line in _wrapped(f"-> {finding.cure}", width - len(indent)))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(printable(text), width, break_on_hyphens=False) or [""]


def summary_line(kind: str, groups: Groups) -> str:
    count = Counter(finding.level for findings in groups.values() for finding in findings)
    words = f"{_counted(count[ERROR], 'error')}, {_counted(count[WARNING], 'warning')}, {count[OK]} OK"
    help_line = "; docs/errors.md lists each code" if count[ERROR] + count[WARNING] else ""
    return f"checked for ranks on {kind}: {words}{help_line}"


def _counted(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"


def groups_as_json(kind: str, groups: Groups) -> str:
    """All findings as JSON in ASCII."""
    findings = [
        {"group": name, "check": one.check, "level": one.level, "code": one.code, "found": one.found, "cure": one.cure}
        for name, group in groups.items() for one in group
    ]  # fmt: skip
    count = Counter(finding["level"] for finding in findings)
    counts = {level: count[level] for level in FINDING_LEVELS}
    level = worst(one for group in groups.values() for one in group)
    return json.dumps({"format": _FORMAT, "device": kind, "level": level, "counts": counts, "findings": findings},
                      indent=2)  # fmt: skip
