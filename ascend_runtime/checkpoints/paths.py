"""Paths of models, and of the small files next to them. Does not import torch, so that commands start fast."""

from __future__ import annotations

from pathlib import Path

from ..errors import coded_error

DEFAULTS = "ascend_defaults.json"  # a model's default settings (recognition/defaults.py)
CALIBRATION = "ascend_calibration.json"  # a model's calibration (recognition/calibration_file.py)
DESCRIPTION_PATTERN = "quant_model_description*.json"  # msModelSlim's description of a quantized model


def existing(path: str) -> Path:
    """`path`, if it is a folder or a file. Raises ValueError if it is neither, or empty, like an unset $MODEL."""
    if not str(path):
        raise coded_error("AV-1301", "The path is empty. Give the path of a model's folder or file.")
    root = Path(path).expanduser()
    try:
        if root.is_file() or root.is_dir():
            return root
        why = "is neither a folder nor a file" if root.exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        raise coded_error(
            "AV-1301", f"{path!r} cannot be a path ({error}). Give the path of a model's folder or file."
        ) from None
    raise coded_error("AV-1301", f"{root} {why}. Give the path of a model's folder or file.")


def file_of(path: str | Path, name: str) -> Path:
    """The path of the file `name` of the model at `path`: in its folder, or next to its file."""
    model = Path(path).expanduser()
    return model / name if model.is_dir() else model.with_name(f"{model.name}.{name}")
