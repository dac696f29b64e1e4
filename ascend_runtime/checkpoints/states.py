"""The state of files on disk, which tells whether what was read of them still holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def files_of(shards: Iterable[Path]) -> list[Path]:
    """The files that shards consist of."""
    return [file for shard in shards for file in (sorted(shard.iterdir()) if shard.is_dir() else (shard,))]


def states(shards: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Of each file: path, size and time of the last change."""
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(shards))


def content_state(file: Path) -> tuple[int, ...]:
    """Of a file by whichever name or link: the same while it is the same file, with the same content and rights."""
    state = file.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
