"""Which files of a model's folder may be copied as they are.

Weights and configs are read through links, wherever these lead: what comes of them is tensors and numbers, or a
refusal. A copy of a file would be anything, such as a key of the user's to which a link in a downloaded folder leads.
So a copy is made of what lies, with all links resolved, in the folder itself, which may be a link; or in `blobs` of the
cache of Hugging Face in which it lies, whose snapshots consist of links to there:

    models--ORG--NAME/snapshots/REVISION/vae/config.json -> ../../../blobs/HASH
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"
MOST_FILES, DEEPEST = 10_000, 32  # of a folder that is copied; a model's has some tens, in two levels


def resolved(path: Path) -> Path:
    """Without links. Raises ValueError for a link that leads to itself."""
    try:
        return path.resolve()
    except (RuntimeError, OSError):  # the first before Python 3.13
        raise ValueError(f"{path} is a link that leads to itself. Delete it.") from None


def own_file(path: Path, folder: Path) -> Path:
    """The file `path` of `folder`, without links. Raises ValueError where it is no file of that folder."""
    found = resolved(path)
    if not any(found.is_relative_to(root) for root in _roots(resolved(folder))):
        raise ValueError(
            f"{path} is a link to {found}, outside of {folder}. A link is not followed there, to copy what nobody "
            "meant: put the file itself in its place, or delete the link."
        )
    if not found.is_file():
        raise ValueError(f"{path} is {'no regular file' if found.exists() else 'a link to nothing'}. Delete it.")
    return found


def own_files(inner: Path, folder: Path, pattern: str = "*", deepest: int = DEEPEST + 1) -> dict[Path, Path]:
    """The files of a folder within `folder`, by their paths in it. Raises ValueError as `own_file` does, and for more
    files or levels of folders than a model has.

    pattern: of their names. deepest: levels of folders below it that are looked into.
    """
    if inner.is_symlink():
        own_folder(inner, folder)
    return {path.relative_to(inner): own_file(path, folder) for path in sorted(_files(inner, pattern, deepest))}


def _files(folder: Path, pattern: str, deepest: int) -> Iterator[Path]:
    """Links to files included. Raises ValueError for a link to a folder, and for more than a model has."""
    met = 0
    for inner, folders, files in os.walk(folder, followlinks=False):
        met += len(folders) + len(files)
        level = len(Path(inner).relative_to(folder).parts)
        if met > MOST_FILES or level > DEEPEST:
            raise ValueError(
                f"{folder} has more than {MOST_FILES:,} files, or more than {DEEPEST} folders within one another, and "
                "would be copied whole. Take out of it what is not the model's."
            )
        for path in (Path(inner) / name for name in folders if fnmatch(name, pattern)):
            if path.is_symlink():
                raise ValueError(f"{path} is a link to a folder. Put the folder itself there, or delete the link.")
        yield from (Path(inner) / name for name in files if fnmatch(name, pattern))
        if level == deepest:
            folders.clear()


def own_folder(path: Path, folder: Path) -> None:
    """Raises ValueError where a folder, with links resolved, does not lie in `folder`."""
    if not resolved(path).is_relative_to(resolved(folder)):
        raise ValueError(
            f"{path} is a link to {resolved(path)}, outside of {folder}, and would be copied whole. Put the folder "
            "itself in its place."
        )


def _roots(folder: Path) -> list[Path]:
    caches = [parent.parent / BLOBS for parent in folder.parents if parent.name == SNAPSHOTS]
    return [folder, *caches]
