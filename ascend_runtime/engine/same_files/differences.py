"""How the files of machines differ, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from .listing import HeldFile, Listing

MAX_DIFFERENCES = 4  # files that an error names
COPY_FILES = (
    "Copy the files of one machine to the others, or have the cluster's file map their folder to one with the same "
    "files."
)
RENAME_FILES = "Give files and folders the same names on all machines."

ByMachine = Mapping[str, Listing]  # listings of the same spec, by the machine's name
Spot = tuple[str, str, int]  # what a file belongs to, its name, and its number among those that have both in common


def difference(listings: ByMachine) -> str:
    """What differs between machines whose listings are not all the same, and what to do."""
    unusable = {name: one.error for name, one in listings.items() if one.error}
    if unusable:
        usable = _joined(name for name in listings if name not in unusable)
        said = [f"On {name}: {error}" for name, error in unusable.items()]
        return " ".join([*said, f"The files on {usable} can be used.", COPY_FILES])
    said = _of_files({name: _by_place(one.files) for name, one in listings.items()})
    if said:
        return " ".join(["The machines have different files.", *said, COPY_FILES])
    return f"{_of_names(listings)} {RENAME_FILES}"


def _by_place(files: Iterable[HeldFile]) -> dict[Spot, HeldFile]:
    seen: Counter = Counter()
    placed = {}
    for file in files:
        placed[file.part, file.name, seen[file.part, file.name]] = file
        seen[file.part, file.name] += 1
    return placed


def _of_files(held: Mapping[str, dict[Spot, HeldFile]]) -> list[str]:
    """A sentence about each of the first files that differ, and one about how many more do."""
    places = dict.fromkeys(place for files in held.values() for place in files)
    found = [text for place in places if (text := _of_file({name: held[name].get(place) for name in held}))]
    more = len(found) - MAX_DIFFERENCES
    return found[:MAX_DIFFERENCES] + ([f"{more} more {'file differs' if more == 1 else 'files differ'}."] * (more > 0))


def _of_file(held: Mapping[str, HeldFile | None]) -> str:
    """What machines have of one file; empty if it is the same."""
    kinds: dict[tuple[int, str] | None, list[str]] = {}
    for name, file in held.items():
        kinds.setdefault(file and (file.size, file.digest), []).append(name)
    if len(kinds) == 1:
        return ""
    lacking = kinds.pop(None, [])
    there = [(held[names[0]], f"{held[names[0]].path} on {_joined(names)}") for names in kinds.values()]
    texts = [_differing(there)] if len(there) > 1 else []
    if lacking:
        file, where = there[0]
        texts.append(f"{_joined(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} {where} ({file.part}).")
    return " ".join(texts)


def _differing(there: list[tuple[HeldFile, str]]) -> str:
    part, sizes = there[0][0].part, {file.size for file, _ in there}
    if len(sizes) == 1:
        return f"The content of {_joined(where for _, where in there)} differs, in {sizes.pop():,} bytes each ({part})."
    return f"{_joined(f'{where} has {file.size:,} bytes' for file, where in there)} ({part})."


def _of_names(listings: ByMachine) -> str:
    """What differs because files or folders have other names."""
    known: dict[str, list[str]] = {}
    for name, one in listings.items():
        known.setdefault(one.distilled, []).append(name)
    if len(known) == 1:
        return "The machines have the same files in another order, which goes by their names."
    said = _joined(f"{distilled or 'not distilled'} on {_joined(names)}" for distilled, names in known.items())
    return f"By the names of its files and folders, the model is {said}, so its default settings differ."


def _joined(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
