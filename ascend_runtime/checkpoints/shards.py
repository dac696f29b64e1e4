"""Files that hold one network in shards, by their names: name-00001-of-00004.safetensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.\w+)$")
FEW = 4  # names that are shown


def one_of_several(file: Path) -> str:
    """That a file is a part of a network, where its name says so; else empty."""
    named = SHARD.match(file.name)
    if named is None or int(named[3]) < 2:
        return ""
    return (
        f"By its name it is shard {int(named[2])} of {int(named[3])} of one network. Give its folder, {file.parent}, "
        f"in which all {int(named[3])} must lie."
    )


def all_shards(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """`files` where they are the shards of one network by their names; none where they are not named so.

    Raises ValueError where shards of it are missing, or belong to several networks.
    """
    named = [SHARD.match(file.name) for file in files]
    if not files or not all(named):
        return ()
    networks = sorted({(match[1], match[3], match[4]) for match in named})
    if len(networks) > 1:
        shown = first([f"{name}-...-of-{count}{suffix}" for name, count, suffix in networks])
        raise ValueError(f"{files[0].parent} holds shards of several networks: {shown}. Give each a folder of its own.")
    count, there = int(networks[0][1]), {int(match[2]) for match in named}
    if len(there) < count:
        missing = [number for number in range(1, min(count, 100_000) + 1) if number not in there]
        raise ValueError(f"{files[0].parent} lacks shard {first(missing)} of {count}. Download what is missing.")
    return files


def first(things: Sequence) -> str:
    return ", ".join([*map(str, things[:FEW]), *(["..."] if len(things) > FEW else [])])
