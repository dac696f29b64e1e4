"""Words a report in each language. All its texts are in locales/*/report.json, each once, under the same keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = tuple(sorted(folder.name for folder in LOCALES.iterdir() if (folder / "report.json").exists()))
ENGLISH = "en"  # of the text that programs and other pages get
OUTPUT = "ascend_report"  # of a node's output, which web/report.js reads


class Say(NamedTuple):
    """A text by its key, and what stands in its places: a string, a number, another `Say`, a list of them, or a tuple
    of whole clauses."""

    key: str
    values: dict[str, Any] = {}


def output(lines: Sequence[Say]) -> dict[str, list]:
    """What a node puts out for its report: {"text": [in English], OUTPUT: [{language: text}]}."""
    worded = {language: "\n".join(in_words(line, language) for line in lines) for language in LANGUAGES}
    return {"text": [worded[ENGLISH]], OUTPUT: [worded]}


def in_words(said: Say, language: str) -> str:
    return texts(language)[said.key].format(**{name: _word(value, language) for name, value in said.values.items()})


@cache
def texts(language: str) -> dict[str, str]:
    return json.loads((LOCALES / language / "report.json").read_text(encoding="utf-8"))


def duration(seconds: float) -> Say:
    """Such as "2 h 5 min", "4 min 10 s", "12 s", "0.4 s"."""
    if seconds < 10:
        return Say("seconds", {"s": f"{seconds:.1f}" if seconds >= 0.1 else f"{seconds:.2g}"})
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return Say("hours", {"h": minutes // 60, "m": minutes % 60})
    return Say("minutes", {"m": minutes, "s": rest}) if minutes else Say("seconds", {"s": rest})


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def _word(value: Any, language: str) -> str:
    if isinstance(value, Say):
        return in_words(value, language)
    if isinstance(value, (list, tuple)):
        between = texts(language)["between clauses" if isinstance(value, tuple) else "between"]
        return between.join(_word(one, language) for one in value)
    return str(value)
