"""Prints what made a video, and whether this host would make the same."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import msgspec

from ...checkpoints.faults import printable
from ..progress import ProgressDisplay
from . import host, metadata, words

NO_METADATA = 2


def run(arguments: Namespace, progress: ProgressDisplay | None = None) -> int:
    """Returns 0 if this host would make the same video, also within rounding; 1 if it would make another, or that
    cannot be known; 2 if the file has no metadata of the ranks. Raises ValueError for files that cannot be read."""
    progress = progress or ProgressDisplay()
    try:
        read = metadata.read(Path(arguments.file).expanduser())
    except metadata.NoMetadata as error:
        progress.refuse(error)
        return NO_METADATA
    progress.begin("comparing with the models of this host")
    folders = [Path(folder).expanduser() for folder in arguments.models or host.models_folders()]
    found = host.reasons(read, host.Host.looked_at(folders, read))
    verdict, notes = host.verdict_of(found), [*host.notes(read)]
    progress.end()
    if arguments.json:
        print(json.dumps(_as_json(read, found, verdict, notes), indent=1))
    else:
        print(*words.lines(read, found, verdict, notes), sep="\n")
    return 0 if verdict <= host.Verdict.ROUNDING else 1


def _as_json(read: metadata.Metadata, found: list[host.Deviation], verdict: host.Verdict, notes: list[str]) -> dict:
    reasons = [{"verdict": reason.verdict.name.lower(), "text": printable(reason.text)} for reason in found]
    return {"record": msgspec.to_builtins(read.record), **words.texts_of(read.graph), "verdict": verdict.name.lower(),
            "reasons": reasons, "notes": notes}  # fmt: skip
