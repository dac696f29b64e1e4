"""What `python -m ascend_runtime calibrate` found out of a model, in a file of JSON beside it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ..checkpoints.bounded import LONGEST_NAME, read_bounded
from ..checkpoints.faults import shown
from ..checkpoints.paths import CALIBRATION, file_of
from ..specs import Calibration

LONGEST = 2**20  # bytes; of two experts with 50 steps each it has 2 kB
EXPERTS = 2  # of a model, at most


def calibration_file(path: str) -> Path:
    """Where the calibration of the model at `path` lies: in its folder, or beside its file."""
    return file_of(path, CALIBRATION)


def read_calibration(path: str) -> dict[str, Calibration]:
    """Of each expert of the model at `path`; empty where there is none. Raises ValueError for a file that is none."""
    file = calibration_file(path)
    if not os.path.lexists(file):
        return {}
    try:
        found = msgspec.json.decode(read_bounded(file, LONGEST), type=dict[str, Calibration])
        if len(found) > EXPERTS or not all(name.isprintable() and len(name) <= LONGEST_NAME for name in found):
            raise ValueError(f"it is of {len(found)} experts, with names such as '{shown(next(iter(found)))}'")
    except (ValueError, RecursionError) as error:  # what msgspec raises is one of the former
        why = shown(error)
        raise ValueError(f"{file} is no calibration ({why}). Remove it, or calibrate the model again.") from None
    return found


def write_calibration(file: Path, found: dict[str, Calibration]) -> None:
    """In one go: a job that reads it meanwhile sees the one before, or this one."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    os.replace(partial, file)
