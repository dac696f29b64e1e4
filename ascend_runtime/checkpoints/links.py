"""Which files of a model's folder may be copied as they are.

Weights and configs are read through links, wherever these lead: what comes of them is tensors and numbers, or a
refusal. A copy of a file would be anything, such as a key of the user's to which a link in a downloaded folder leads.
So a copy is made of what lies, with all links resolved, in the folder itself, which may be a link; or in `blobs` of the
cache of Hugging Face in which it lies, whose snapshots consist of links to there:

    models--ORG--NAME/snapshots/REVISION/vae/config.json -> ../../../blobs/HASH
"""

from __future__ import annotations

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def own_file(path: Path, folder: Path) -> Path:
    """The file `path` of `folder`, without links. Raises ValueError where it is no file of that folder."""
    found = path.resolve()
    if not any(found.is_relative_to(root) for root in _roots(folder.resolve())):
        raise ValueError(
            f"{path} is a link to {found}, outside of {folder}. A link is not followed there, to copy what nobody "
            "meant: put the file itself in its place, or delete the link."
        )
    if not found.is_file():
        raise ValueError(f"{path} is {'no regular file' if found.exists() else 'a link to nothing'}. Delete it.")
    return found


def own_files(inner: Path, folder: Path, pattern: str = "**/*") -> dict[Path, Path]:
    """All files of a folder within `folder`, by their paths in it. Raises ValueError as `own_file` does."""
    if inner.is_symlink():
        own_folder(inner, folder)
    found = {path.relative_to(inner): path for path in sorted(inner.glob(pattern))}
    for path in found.values():
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{path} is a link to a folder. Put the folder itself in its place, or delete the link.")
    return {name: own_file(path, folder) for name, path in found.items() if not path.is_dir()}


def own_folder(path: Path, folder: Path) -> None:
    """Raises ValueError where a folder, with links resolved, does not lie in `folder`."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of {folder}, and would be copied whole. Put the folder "
            "itself in its place."
        )


def _roots(folder: Path) -> list[Path]:
    caches = [parent.parent / BLOBS for parent in folder.parents if parent.name == SNAPSHOTS]
    return [folder, *caches]
