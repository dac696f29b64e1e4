"""The workflows that come with the pack: their names in ComfyUI's template browser, and their short names.

workflows/SHOWN.json is in UI format, workflows/api/SHORT.json in API format, and workflows/names.txt has a line
"SHORT: SHOWN" for each. ComfyUI shows the first name. The second one fits commands and links, and is also what the
files in UI format were called before. A second short name of a workflow is that of one that it has replaced, whose
prompt stays.
"""

from __future__ import annotations

from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
_LIST = WORKFLOWS / "names.txt"
_NAMES = _LIST.read_text().splitlines() if _LIST.is_file() else []  # a copy that pip installed has no templates
SHOWN = dict(line.split(": ", 1) for line in _NAMES)  # by short name
SHORT = [name for place, name in enumerate(SHOWN) if SHOWN[name] not in list(SHOWN.values())[:place]]  # one for each


def shown_file(short: str) -> Path:
    """The file in UI format of a short name."""
    return WORKFLOWS / f"{SHOWN[short]}.json"


def api_file(short: str) -> Path:
    """The file in API format of a short name."""
    return WORKFLOWS / "api" / f"{short}.json"


def named(name: str | Path) -> Path | None:
    """The file in API format of a template by either of its names, with or without a folder and .json; None if no
    template has this name."""
    given = Path(name).name.removesuffix(".json")
    short = next((short for short, shown in SHOWN.items() if given in (short, shown)), None)
    return None if short is None else api_file(short)
