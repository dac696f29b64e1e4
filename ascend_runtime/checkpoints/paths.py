"""Paths of models, and of the small files next to them. Free of torch: commands ask before they import it."""

from __future__ import annotations

from pathlib import Path

DEFAULTS = "ascend_defaults.json"  # what a model is run with (families/defaults.py)
CALIBRATION = "ascend_calibration.json"  # what was found out about it (checkpoints/calibration.py)


def existing(path: str) -> Path:
    """`path`, which is a folder or a file. Raises ValueError where it is neither, or empty, as an unset $MODEL is."""
    if not str(path):
        raise ValueError("The path is empty. Give the path of a model's folder or file.")
    root = Path(path).expanduser()
    try:
        if root.is_file() or root.is_dir():
            return root
        why = "is neither a folder nor a file" if root.exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        raise ValueError(f"{path!r} cannot be a path ({error}). Give the path of a model's folder or file.") from None
    raise ValueError(f"{root} {why}. Give the path of a model's folder or file.")


def file_of(path: str | Path, name: str) -> Path:
    """Where the file `name` of the model at `path` lies: in its folder, or next to its file."""
    model = Path(path).expanduser()
    return model / name if model.is_dir() else model.with_name(f"{model.name}.{name}")
