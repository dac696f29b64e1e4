"""Reads and writes a model's calibration by `python -m ascend_runtime calibrate`: a JSON file next to the model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from ..checkpoints.bounded import MAX_NAME_LENGTH, read_bounded
from ..checkpoints.digest import DIGEST_BYTES
from ..checkpoints.faults import shown
from ..checkpoints.paths import CALIBRATION, file_of
from ..errors import coded_error
from ..specs import Calibration
from ..specs.record import MAX_NAME

MAX_CALIBRATION_BYTES = 2**20  # two experts with 50 steps each take 2 kB
MAX_EXPERTS = 2


def calibration_file(path: str) -> Path:
    """The path of the calibration of the model at `path`: in its folder, or next to its file."""
    return file_of(path, CALIBRATION)


def read_calibration(path: str) -> dict[str, Calibration]:
    """The calibration of the model at `path`, by expert; empty if there is none. Raises ValueError for an invalid
    file."""
    file = calibration_file(path)
    if not os.path.lexists(file):
        return {}
    try:
        found = msgspec.json.decode(read_bounded(file, MAX_CALIBRATION_BYTES), type=dict[str, Calibration])
        if len(found) > MAX_EXPERTS or not all(name.isprintable() and len(name) <= MAX_NAME_LENGTH for name in found):
            raise ValueError(f"it has {len(found)} experts, with names such as '{shown(next(iter(found)))}'")
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        why = shown(error)
        raise coded_error(
            "AV-1309", f"{file} is not a calibration ({why}). Remove it, or calibrate the model again."
        ) from None
    return found


def calibration_digests(known: dict[str, Calibration]) -> dict[str, str]:
    """A hash of the values of each expert."""
    values = {expert[:MAX_NAME]: repr((one.coefficients, one.ratios)).encode() for expert, one in known.items()}
    return {expert: hashlib.blake2b(text, digest_size=DIGEST_BYTES).hexdigest() for expert, text in values.items()}


def write_calibration(file: Path, found: dict[str, Calibration]) -> None:
    """Replaces the file atomically: a job that reads it meanwhile sees the old calibration or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    os.replace(partial, file)
