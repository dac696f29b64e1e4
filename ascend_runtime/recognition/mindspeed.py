"""Checkpoints that MindSpeed-MM writes: a folder for each iteration, one file in it for each pipeline stage.

    latest_checkpointed_iteration.txt     "release" (converted weights) or the number of the last iteration
    release/ or iter_0001000/
        mp_rank_00[_002]/model_optim_rng.pt   of tensor slice 0 (and pipeline stage 2); its weights under "model"
        .metadata, *.distcp                   or instead of those: torch's distributed checkpoint
"""

from __future__ import annotations

import re
from pathlib import Path

from ..checkpoints.bounded import read_bounded
from ..checkpoints.faults import shown, usable
from ..checkpoints.formats.dcp import METADATA

TRACKER = "latest_checkpointed_iteration.txt"
LONGEST_TRACKER = 64  # bytes
RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
WEIGHTS = "model_optim_rng.pt"
RELEASE = "release"  # the folder of converted weights, and what the tracker says of it


def latest_shards(folder: Path) -> tuple[Path, ...] | None:
    """The files of the latest iteration in the order of their stages; None where MindSpeed-MM did not write `folder`.

    Raises ValueError where the iteration is not there, or its weights are cut into slices.
    """
    if (folder / TRACKER).is_file():
        with usable(folder / TRACKER, "the iteration that it names"):
            iteration = folder / _folder(read_bounded(folder / TRACKER, LONGEST_TRACKER).decode().strip())
            there = iteration.is_dir()
        if not there:
            raise ValueError(f"{folder / TRACKER} names {iteration.name}, which is not there. Copy it beside, or the "
                             "number of another iteration into the file.")  # fmt: skip
        return _shards(iteration)
    return _shards(folder) if (folder / METADATA).is_file() or any(folder.glob("mp_rank_*")) else None


def _folder(latest: str) -> str:
    """That of the iteration which a tracker names: it leads nowhere else."""
    if latest != RELEASE and not (latest.isascii() and latest.isdecimal()):
        raise ValueError(f"it says {latest!r}; that must be {RELEASE!r} or a number")
    return latest if latest == RELEASE else f"iter_{int(latest):07d}"


def _shards(iteration: Path) -> tuple[Path, ...]:
    if (iteration / METADATA).is_file():
        return (iteration,)
    found = {folder: RANK.fullmatch(folder.name) for folder in sorted(iteration.glob("mp_rank_*"))}
    if any(rank is None or int(rank[1]) for rank in found.values()):
        raise ValueError(
            f"{iteration} holds the weights in slices ({shown(', '.join(folder.name for folder in found))}). Convert "
            "them to one slice with MindSpeed-MM's mm-convert WanConverter resplit (tensor parallel size 1)."
        )
    shards = tuple(folder / WEIGHTS for folder in found)
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise ValueError(f"{', '.join(missing) or iteration / 'mp_rank_00' / WEIGHTS} does not exist. Copy it there.")
    return shards
