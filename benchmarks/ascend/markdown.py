"""The report of `benchmarks ascend`, which a user can send in, as Markdown."""

from __future__ import annotations

from typing import Any, Iterable

from ..report import Note, Notes, Row, bar
from .machine import scrub

LONGEST_REASON = 2000  # characters
TITLE = "# Report of `python -m benchmarks ascend`"
CONDITIONS = (  # of a figure: those that its row shows
    "seconds", "device_memory", "published_speed_up", "step_s", "memory_gb", "ms", "rival_ms", "tokens", "job",
    "source",
)  # fmt: skip


def markdown(facts: dict[str, str], rows: Iterable[Row], notes: Notes) -> str:
    """The report: the machine, the figures, what was left out and what failed. It names no host, user or folder.

    facts: of the machine, by name.
    """
    parts = [
        TITLE,
        _table(("machine", ""), ((name, fact) for name, fact in facts.items() if fact)),
        "## Figures",
        _table(("figure", "measured", "to reach", "ratio", "verdict", "conditions"), map(_cells, rows)),
        "## Failed",
        _why_table(note for note in notes.found if note.failed),
        "## Left out",
        _why_table(note for note in notes.found if not note.failed),
    ]
    return "\n\n".join(parts) + "\n"


def _why_table(notes: Iterable[Note]) -> str:
    """What has the same reason is in one row."""
    reasons: dict[str, list[str]] = {}
    for note in notes:
        reasons.setdefault(scrub(note.why)[:LONGEST_REASON], []).append(note.what)
    rows = [(", ".join(whats), why) for why, whats in reasons.items()]
    return _table(("what", "why"), rows) if rows else "Nothing."


def _cells(row: Row) -> tuple[str, ...]:
    compared = "not_compared" not in row.context and row.baseline
    ratio = f"{row.value / row.baseline:.3g}" if compared else "-"
    conditions = [f"{name}: {_short(row.context[name])}" for name in CONDITIONS if name in row.context]
    why = row.context.get("not_compared")
    return (row.name, f"{row.value:.4g} {row.unit}", bar(row), ratio, row.verdict,
            "; ".join([*([why] if why else []), *conditions]))  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in line)} |"
                     for line in lines)  # fmt: skip
