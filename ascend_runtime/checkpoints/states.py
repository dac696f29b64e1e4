"""Fingerprints of files on disk, to detect that a file changed since it was read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


# Of a file of fp8 weights, and of the file with their scales (formats/scale_maps.py).
FP8_ENDING, MAP_ENDING = "_fp8.pt", "_fp8_map.pt"
PUBLISHED_FP8 = "mp_rank_00_model_states_fp8.pt"  # which is wrong without its scales


def has_scale_map(file: Path) -> bool:
    """Whether a file's weights have scales in another file: one is next to it, or it has the published name. Any other
    file whose name ends so may hold plain casts, which need no scales."""
    return file.name == PUBLISHED_FP8 or (file.name.endswith(FP8_ENDING) and scale_map_of(file).is_file())


def scale_map_of(file: Path) -> Path:
    """The file with the scales of such a file's weights."""
    return file.with_name(file.name.removesuffix(FP8_ENDING) + MAP_ENDING)


def files_of(shards: Iterable[Path]) -> list[Path]:
    """The files of all shards, which may be folders, and of their scales."""
    return [file for shard in shards for file in (sorted(shard.iterdir()) if shard.is_dir() else _with_scales(shard))]


def _with_scales(file: Path) -> tuple[Path, ...]:
    scales = scale_map_of(file) if has_scale_map(file) else None
    return (file,) if scales is None or not scales.is_file() else (file, scales)


def states(shards: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """(path, size, time of the last change) of each file."""
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(shards))


def content_state(file: Path) -> tuple[int, ...]:
    """A fingerprint of a file's content and permissions, whichever name or link leads to it."""
    state = file.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
