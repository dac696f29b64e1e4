"""What `python -m ascend_runtime calibrate` found out of a model, in a file of JSON beside it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ..acceleration import Calibration
from .paths import CALIBRATION, file_of


def calibration_file(path: str) -> Path:
    """Where the calibration of the model at `path` lies: in its folder, or beside its file."""
    return file_of(path, CALIBRATION)


def read_calibration(path: str) -> dict[str, Calibration]:
    """Of each expert of the model at `path`; empty where there is none. Raises ValueError for a file that is none."""
    file = calibration_file(path)
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Calibration])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, OSError) as error:
        raise ValueError(f"{file} is no calibration ({error}). Remove it, or calibrate the model again.") from None


def write_calibration(file: Path, found: dict[str, Calibration]) -> None:
    """In one go: a job that reads it meanwhile sees the one before, or this one."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    os.replace(partial, file)
