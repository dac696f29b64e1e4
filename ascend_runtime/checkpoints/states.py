"""Fingerprints of files on disk, to detect that a file changed since it was read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def files_of(shards: Iterable[Path]) -> list[Path]:
    """The files of all shards, which may be folders."""
    return [file for shard in shards for file in (sorted(shard.iterdir()) if shard.is_dir() else (shard,))]


def states(shards: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """(path, size, time of the last change) of each file."""
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(shards))


def content_state(file: Path) -> tuple[int, ...]:
    """A fingerprint of a file's content and permissions, whichever name or link leads to it."""
    state = file.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
