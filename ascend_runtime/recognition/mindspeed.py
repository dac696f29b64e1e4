"""Finds checkpoints of MindSpeed-MM: a folder for each iteration, which holds one file for each pipeline stage.

    latest_checkpointed_iteration.txt     "release" (converted weights) or the number of the last iteration
    release/ or iter_0001000/
        mp_rank_00[_002]/model_optim_rng.pt   tensor slice 0 (of pipeline stage 2); its weights are under "model"
        .metadata, *.distcp                   or, instead: torch's distributed checkpoint
"""

from __future__ import annotations

import re
from pathlib import Path

from ..checkpoints.bounded import read_bounded
from ..checkpoints.faults import as_value_error, shown
from ..checkpoints.formats.dcp import METADATA
from ..errors import coded_error

TRACKER = "latest_checkpointed_iteration.txt"
MAX_TRACKER_BYTES = 64  # bytes
RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
STAGE_FILE = "model_optim_rng.pt"
RELEASE = "release"  # the folder of converted weights, and its name in the tracker


def latest_shards(folder: Path) -> tuple[Path, ...] | None:
    """The files of the latest iteration, in the order of their stages; None if MindSpeed-MM did not write `folder`.

    Raises ValueError if the iteration is missing, or its weights are cut by tensor parallelism.
    """
    if (folder / TRACKER).is_file():
        with as_value_error(folder / TRACKER, "the iteration that it names"):
            iteration = folder / _folder(read_bounded(folder / TRACKER, MAX_TRACKER_BYTES).decode().strip())
            there = iteration.is_dir()
        if not there:
            raise coded_error(
                "AV-1307",
                f"{folder / TRACKER} names {iteration.name}, which is missing. Copy it there, or write the number of "
                "another iteration into the file.",
            )
        return _shards(iteration)
    return _shards(folder) if (folder / METADATA).is_file() or _stages(folder) else None


def _folder(latest: str) -> str:
    """The folder of the iteration that a tracker names, which cannot lead out of the checkpoint."""
    if latest != RELEASE and not (latest.isascii() and latest.isdecimal()):
        raise ValueError(f"it says {latest!r}; it must be {RELEASE!r} or a number")
    return latest if latest == RELEASE else f"iter_{int(latest):07d}"


def _stages(iteration: Path) -> list[Path]:
    """The folders of its stages; other systems have files of such names."""
    return [path for path in sorted(iteration.glob("mp_rank_*")) if path.is_dir()]


def _shards(iteration: Path) -> tuple[Path, ...]:
    if (iteration / METADATA).is_file():
        return (iteration,)
    found = {folder: RANK.fullmatch(folder.name) for folder in _stages(iteration)}
    if any(rank is None or int(rank[1]) for rank in found.values()):
        raise coded_error(
            "AV-1305",
            f"{iteration} holds weights in slices ({shown(', '.join(folder.name for folder in found))}). Convert them "
            "to tensor parallel size 1 with MindSpeed-MM's mm-convert WanConverter resplit.",
        )
    shards = tuple(folder / STAGE_FILE for folder in found)
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing or not shards:
        files = ", ".join(missing) or iteration / "mp_rank_00" / STAGE_FILE
        raise coded_error("AV-1307", f"{files} does not exist. Copy it there.")
    return shards
