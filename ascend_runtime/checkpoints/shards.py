"""Recognises the shards of one network by their file names: name-00001-of-00004.safetensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import coded_error

SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.\w+)$")
MAX_LISTED = 4  # in an error


def one_of_several(file: Path) -> str:
    """A sentence about a file that is one of several shards by its name; empty for other files."""
    named = SHARD.match(file.name)
    if named is None or int(named[3]) < 2:
        return ""
    return (
        f"By its name it is shard {int(named[2])} of {int(named[3])} of one network. Give its folder, {file.parent}, "
        f"which must contain all {int(named[3])}."
    )


def all_shards(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """`files`, if they are the shards of one network by their names; empty if they have other names.

    Raises ValueError if shards are missing, or belong to several networks.
    """
    named = [SHARD.match(file.name) for file in files]
    if not files or not all(named):
        return ()
    networks = sorted({(match[1], match[3], match[4]) for match in named})
    if len(networks) > 1:
        shown = first([f"{name}-...-of-{count}{suffix}" for name, count, suffix in networks])
        raise coded_error(
            "AV-1310", f"{files[0].parent} holds shards of several networks: {shown}. Put each into its own folder."
        )
    count, there = int(networks[0][1]), {int(match[2]) for match in named}
    if len(there) < count:
        missing = [number for number in range(1, min(count, 100_000) + 1) if number not in there]
        raise coded_error(
            "AV-1307", f"{files[0].parent} lacks shard {first(missing)} of {count}. Download the missing shards."
        )
    return files


def first(things: Sequence) -> str:
    return ", ".join([*map(str, things[:MAX_LISTED]), *(["..."] if len(things) > MAX_LISTED else [])])
