"""Which family a loader's files belong to: by their content, or by their names where they are not found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ...models.family import TEXT_ENCODER, TRANSFORMER, VAE, Family
from ...models.registry import families
from .graph import GraphNode
from .loaders import WHOLE

MAX_REASON = 300  # characters of a reason

Find = Callable[[str, str], "Path | None"]  # (part, file's name) -> the file; None: there is none


def verdict(entry: GraphNode, find: Find) -> Family | str:
    """The family whose ranks can do a loader's work, or why none can."""
    try:
        return _family_of(entry, find)
    except ValueError as error:
        return _short(error)


def _family_of(entry: GraphNode, find: Find) -> Family:
    loader = entry.loader
    if len(entry.shown.names) < len(loader.files):
        raise ValueError("its file comes from another node, so it is not known which model it is")
    wanted = _family_of_type(entry.widget(loader, "type")) if loader.part == TEXT_ENCODER else None
    for name in entry.shown.names:
        path = find(loader.part, name)
        if path is not None:
            own = _family_of_file(loader.part, path, name, wanted)
        else:
            own = wanted or _family_of_name(loader.part, name)
        wanted = wanted or own
    return wanted


def _family_of_type(value: str | None) -> Family:
    """The family whose text encoders core's loaders load with this `type`."""
    known = {one.core_text.type: one for one in families().values() if one.core_text is not None}
    if value not in known:
        raise ValueError(f"its type is {value}; the ranks run {' and '.join(sorted(known))}")
    return known[value]


def _family_of_file(part: str, path: Path, name: str, wanted: Family | None) -> Family:
    from ...recognition.kinds import is_kind, kinds  # imports torch, which takes seconds
    from ...recognition.layout import find_transformer, find_vae

    try:
        if part in (TRANSFORMER, WHOLE):
            return find_transformer(str(path)).family
        if part == VAE:
            return find_vae(str(path)).family
        fitting = [kind for kind in kinds() if kind.name in wanted.text_parts and kind.family == wanted.name]
        if any(is_kind(kind, path) for kind in fitting):
            return wanted
        raise ValueError(f"{path} is not {' or '.join(f'a {kind.what}' for kind in fitting)}")
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None


def _family_of_name(part: str, name: str) -> Family:
    """The family that a file's name speaks of."""
    short = re.split(r"[\\/]", name.lower())[-1]
    wanted = TRANSFORMER if part == WHOLE else part
    found = next((one for one in families().values() if one.stock.are_in(short, wanted)), None)
    if found is None:
        known = " or ".join(one.title for one in families().values())
        raise ValueError(f"the file was not found here, and its name does not say that it belongs to {known}")
    for what, pattern in found.stock.others.items():
        if re.search(pattern, short):
            raise ValueError(f"by its name it is {what}, which the ranks do not run")
    return found


def _short(error: ValueError) -> str:
    text = str(error)
    return (text if len(text) <= MAX_REASON else text[:MAX_REASON].rstrip() + " ...").rstrip(".")
