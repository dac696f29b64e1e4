"""Checks which files of a model's folder may be copied unchanged.

Weights and configs may be read through any link, because the result is tensors and numbers, or an error. A copied file
may contain anything, such as the user's private key, if a link in a downloaded folder leads to it. So a file is copied
only if, with all links resolved, it lies in the folder itself (which may be a link), or in the `blobs` folder of the
Hugging Face cache that contains the folder, whose snapshots consist of links to it:

    models--ORG--NAME/snapshots/REVISION/vae/config.json -> ../../../blobs/HASH
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ...errors import coded_error

SNAPSHOTS, BLOBS = "snapshots", "blobs"
MAX_FILES, MAX_FOLDER_DEPTH = 10_000, 32  # of a copied folder; a model's folder has tens of files, in two levels


def resolved(path: Path) -> Path:
    """`path` with links resolved. Raises ValueError for a link that leads to itself."""
    try:
        return path.resolve()
    except (RuntimeError, OSError):  # RuntimeError before Python 3.13
        raise coded_error("AV-1318", f"{path} is a link that leads to itself. Delete it.") from None


def own_file(path: Path, folder: Path) -> Path:
    """The file `path` of `folder`, with links resolved. Raises ValueError if it is not a file of that folder."""
    found = resolved(path)
    if not any(found.is_relative_to(root) for root in _roots(resolved(folder))):
        raise coded_error(
            "AV-1318",
            f"{path} is a link to {found}, outside of {folder}, and copying it could expose another file. Replace "
            "the link with the file itself, or delete it.",
        )
    if not found.is_file():
        raise coded_error(
            "AV-1318", f"{path} is {'not a regular file' if found.exists() else 'a broken link'}. Delete it."
        )
    return found


def own_files(inner: Path, folder: Path, pattern: str = "*", deepest: int = MAX_FOLDER_DEPTH + 1) -> dict[Path, Path]:
    """The files of `inner`, a folder within `folder`, by their paths in `inner`. Raises ValueError like `own_file`, and
    for more files or levels of folders than a model has.

    pattern: of their names. deepest: the number of levels of subfolders to search.
    """
    if inner.is_symlink():
        own_folder(inner, folder)
    return {path.relative_to(inner): own_file(path, folder) for path in sorted(_files(inner, pattern, deepest))}


def _files(folder: Path, pattern: str, deepest: int) -> Iterator[Path]:
    """All files, including links to files. Raises ValueError for a link to a folder, and for too many files."""
    met = 0
    for inner, folders, files in os.walk(folder, followlinks=False):
        met += len(folders) + len(files)
        level = len(Path(inner).relative_to(folder).parts)
        if met > MAX_FILES or level > MAX_FOLDER_DEPTH:
            raise coded_error(
                "AV-1312",
                f"{folder} has more than {MAX_FILES:,} files, or more than {MAX_FOLDER_DEPTH} levels of folders, and "
                "all would be copied. Remove what does not belong to the model.",
            )
        for path in (Path(inner) / name for name in folders if fnmatch(name, pattern)):
            if path.is_symlink():
                raise coded_error(
                    "AV-1318", f"{path} is a link to a folder. Replace it with the folder itself, or delete it."
                )
        yield from (Path(inner) / name for name in files if fnmatch(name, pattern))
        if level == deepest:
            folders.clear()


def own_folder(path: Path, folder: Path) -> None:
    """Raises ValueError if a folder, with links resolved, does not lie in `folder`."""
    if not resolved(path).is_relative_to(resolved(folder)):
        raise coded_error(
            "AV-1318",
            f"{path} is a link to {resolved(path)}, outside of {folder}, and would be copied. Replace the link "
            "with the folder itself.",
        )


def _roots(folder: Path) -> list[Path]:
    caches = [parent.parent / BLOBS for parent in folder.parents if parent.name == SNAPSHOTS]
    return [folder, *caches]
