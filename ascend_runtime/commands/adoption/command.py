"""`python -m ascend_runtime adopt WORKFLOW`: writes a stock ComfyUI graph with our loaders, or, back, with core's."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ...checkpoints.faults import printable
from ..progress import ProgressDisplay
from ..queue.workflow import read_graph
from .loaders import FOLDERS
from .swapping import Adoption, adopt, give_back

NOTHING_SWAPPED = 1


def output_of(arguments: argparse.Namespace) -> Path:
    """The file to write. Raises ValueError if it exists."""
    source, end = Path(arguments.workflow), "core" if arguments.back else "ascend"
    target = arguments.output or source.with_name(f"{source.stem}_{end}.json")
    if target.exists():
        raise ValueError(f"{target} exists. Give another file with --output, or delete it.")
    return target


def run(arguments: argparse.Namespace, progress: ProgressDisplay | None = None) -> int:
    """Writes the swapped graph, and prints what was swapped and what was left. Returns 0, or 1 if nothing was swapped,
    in which case nothing is written."""
    progress = progress or ProgressDisplay()
    source, target = Path(arguments.workflow), output_of(arguments)
    graph, (indent, end) = read_graph(source), _style(source)
    progress.begin("swapping")
    done = give_back(graph) if arguments.back else adopt(graph, partial(_find, arguments.models))
    progress.end()
    print(*map(printable, lines_of(done)), sep="\n")
    if not done.swapped:
        print("nothing was swapped, so nothing was written")
        return NOTHING_SWAPPED
    with target.open("x", encoding="utf-8") as file:
        file.write(json.dumps(done.graph, indent=indent, ensure_ascii=False) + end)
    print(printable(f"written: {target}"))
    return 0


def lines_of(done: Adoption) -> Iterable[str]:
    """The report of a swap."""
    yield from (f"swapped: {node}" for node in done.swapped)
    yield from (f"left: {node}: {why}" for node, why in done.left)
    yield from (f"note: {note}" for note in done.notes)


def _style(file: Path) -> tuple[int | None, str]:
    """How a JSON file is written: the spaces of its first indent, None if it is in one line; what follows it."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    indent = re.match(r"\s*\{\s*?\n( +)", text)
    return len(indent[1]) if indent else None, "\n" if text.endswith("\n") else ""


def _find(models: Path | None, part: str, name: str) -> Path | None:
    """A file in ComfyUI's folder of models."""
    if models is None or "\0" in name:
        return None
    places = (models / folder / name for folder in FOLDERS[part])
    return next((place for place in places if place.is_file()), None)
