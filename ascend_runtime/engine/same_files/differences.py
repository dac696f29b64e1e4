"""How the files of machines differ, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .listing import HeldFile, Listing

MAX_DIFFERENCES = 4  # files that an error names
CURE = (
    "Copy the files of one machine to the others, or have the cluster's file map the folder to one with the same files."
)

ByMachine = Mapping[str, Listing]  # listings of the same spec, by the machine's name
Place = tuple[str, str, int]  # what a file belongs to, its name, and its number among those that have both in common


def difference(listings: ByMachine) -> str:
    """What differs between machines whose listings are not all the same, and what to do."""
    unusable = {name: one.error for name, one in listings.items() if one.error}
    if unusable:
        usable = _names(name for name in listings if name not in unusable)
        said = [f"On {name}: {error}" for name, error in unusable.items()]
        return " ".join([f"The files on {usable} can be used.", *said, CURE])
    held = {name: _by_place(one.files) for name, one in listings.items()}
    places = dict.fromkeys(place for files in held.values() for place in files)
    found = [text for place in places if (text := _of_file(place, {name: held[name].get(place) for name in held}))]
    said = found[:MAX_DIFFERENCES]
    if len(found) > MAX_DIFFERENCES:
        said.append(f"{len(found) - MAX_DIFFERENCES} more files differ.")
    if not found and len({one.distilled for one in listings.values()}) == 1:
        said = ["They have the same files in another order, by their names."]
    return " ".join(["The machines have different files.", *said, *_of_names(listings), CURE])


def _by_place(files: tuple[HeldFile, ...]) -> dict[Place, HeldFile]:
    seen: Counter = Counter()
    placed = {}
    for file in files:
        placed[file.part, file.name, seen[file.part, file.name]] = file
        seen[file.part, file.name] += 1
    return placed


def _of_file(place: Place, held: Mapping[str, HeldFile | None]) -> str:
    """What machines have in one place; empty if it is the same."""
    kinds: dict[tuple[int, str] | None, list[str]] = {}
    for name, file in held.items():
        kinds.setdefault(file and (file.size, file.digest), []).append(name)
    if len(kinds) == 1:
        return ""
    lacking = kinds.pop(None, [])
    groups = [(held[names[0]], names) for names in kinds.values()]
    there = " and ".join(f"{file.path} on {_names(names)}" for file, names in groups)
    sizes = [file.size for file, _ in groups]
    texts = []
    if len(groups) > 1 and len(set(sizes)) == 1:
        texts.append(f"{there} have {sizes[0]:,} bytes each, but their content differs ({place[0]}).")
    elif len(groups) > 1:
        there = " and ".join(f"{file.path} on {_names(names)} has {file.size:,} bytes" for file, names in groups)
        texts.append(f"{there} ({place[0]}).")
    if lacking:
        lacks = "lacks" if len(lacking) == 1 else "lack"
        texts.append(f"{_names(lacking)} {lacks} what is {there} ({place[0]}).")
    return " ".join(texts)


def _of_names(listings: ByMachine) -> list[str]:
    """What differs because files or folders have other names."""
    known: dict[str, list[str]] = {}
    for name, one in listings.items():
        known.setdefault(one.distilled, []).append(name)
    if len(known) == 1:
        return []
    said = " and ".join(f"{distilled or 'not distilled'} on {_names(names)}" for distilled, names in known.items())
    return [f"By the names of its files and folders, the model is {said}: give them the same names."]


def _names(names) -> str:
    return ", ".join(names)
