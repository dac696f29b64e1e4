"""The names of a transformer's layers in LoRA files."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def spellings_of(own: set[str], given: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, str]:
    """The own name of each layer, and of each parameter outside of layers, by all names that it has in files.

    given: other systems' names; rename: maps a parameter's name in any system to its own. Some tools write underscores
    for dots.
    """
    spelled = {name: name for name in own}
    for theirs in given:
        for name in (rename(f"{theirs}.weight") or "", rename(theirs) or ""):
            if (name := name.removesuffix(".weight")) in own:
                spelled[theirs] = name
    return spelled | {name.replace(".", "_"): layer for name, layer in spelled.items()}
