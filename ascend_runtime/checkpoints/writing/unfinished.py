"""Makes a folder step by step under a temporary name, so that an interrupted run can be resumed.

    TARGET.partial/journal   what is being made, and a line for each sync to disk with the number of finished steps
    TARGET.partial/made/     is renamed to TARGET when it is complete
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..bounded import parse_json
from ..faults import as_value_error
from .links import resolved

JOURNAL, MADE = "journal", "made"


class Unfinished:
    """made: the folder to write to. done: the number of recorded steps; None if nothing was begun."""

    def __init__(self, target: Path, journal, done: int | None):
        self.made = partial_folder(target) / MADE
        self.done = done
        self._target, self._journal = target, journal

    def place(self, path: Path) -> Path:
        """The path of a file in the new folder; makes its parent folders. Raises ValueError if the path, with links
        resolved, lies outside of the new folder."""
        place = self.made / path
        if not resolved(place).is_relative_to(resolved(self.made)):
            raise ValueError(f"{path} leads out of {self.made}. Nothing was written.")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def record(self, done: int) -> None:
        """Records the number of finished steps. Call it only when their output is on disk."""
        self._journal.write(f"{done}\n".encode())
        os.fsync(self._journal.fileno())
        self.done = done

    def finish(self) -> None:
        """Gives the folder its final name. All its files must be on disk."""
        for folder in (*(path for path in self.made.rglob("*") if path.is_dir()), self.made):
            sync(folder)
        self.made.rename(self._target)
        sync(self._target.parent)
        self.clear()

    @property
    def is_finished(self) -> bool:
        """Whether the target exists already, and only cleaning up remains."""
        return self._target.exists()

    def clear(self) -> None:
        shutil.rmtree(partial_folder(self._target))


def partial_folder(target: Path) -> Path:
    return target.parent / f"{target.name}.partial"


@contextmanager
def unfinished(target: Path, identity: dict[str, object]) -> Iterator[Unfinished]:
    """Begins to make `target`, or resumes. Leaves nothing behind if it fails before anything was written.

    identity: the inputs, by the names that an error uses. Raises ValueError if `target` exists, if it was begun with
    other inputs, or if another process is making it.
    """
    folder = partial_folder(target)
    _check_free(target, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("a+b", buffering=0) as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is writing {folder}. Wait for it, or give another target.") from None
        work = Unfinished(target, journal, _done(target, journal, identity))
        try:
            if work.done is None:
                if work.made.exists():
                    shutil.rmtree(work.made)
                journal.truncate(0)
                journal.write(json.dumps(identity).encode() + b"\n")
            yield work
        except BaseException:
            if work.done is None and not work.made.exists():
                work.clear()
            raise


def require_free(target: Path) -> None:
    """Raises ValueError if `target` exists, or its temporary folder is in the way."""
    _check_free(target, partial_folder(target))


def _check_free(target: Path, folder: Path) -> None:
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{target} is a link to {os.readlink(target)}, which does not exist. Give another target.")
    if target.exists() and not (folder / JOURNAL).exists():
        raise ValueError(f"{target} exists. Give another target, or move it away.")
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to {os.readlink(folder)}. Delete it, or give another target.")
    if folder.exists() and not (folder / JOURNAL).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is in the way, but is not from a conversion. Move it away, or give another target.")


def _done(target: Path, journal, identity: dict[str, object]) -> int | None:
    """The number of recorded steps; None if there is nothing to resume."""
    journal.seek(0)
    lines = journal.read().split(b"\n")[:-1]  # what follows the last newline is empty, or a line that was cut off
    made = (partial_folder(target) / MADE).exists()
    if target.exists() and (len(lines) < 2 or made):
        raise ValueError(f"{target} was created by another program meanwhile. Move it away, or give another target.")
    if len(lines) < 2 or not (target.exists() or made):
        return None
    with as_value_error(Path(journal.name), "what was begun there"):
        begun, done = dict(parse_json(lines[0])), int(lines[-1])
    _check_same(partial_folder(target), begun, json.loads(json.dumps(identity)))
    journal.truncate(sum(len(line) + 1 for line in lines))
    return done


def _check_same(folder: Path, begun: dict, given: dict) -> None:
    """Raises ValueError, which says what differs."""
    differences = []
    for key, value in given.items():
        if begun.get(key) != value:
            text = f"{key} changed" if isinstance(value, list) else f"{key} was {begun.get(key)}, is {value}"
            differences.append(text)
    if differences:
        raise ValueError(
            f"{folder} was started with other inputs: {'; '.join(differences)}. To resume, give the same inputs. To "
            "start over, delete it, or give another target."
        )


def sync(path: Path) -> None:
    """Syncs a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
