"""A folder that comes into being step by step, beside its name, and is gone on with after whatever stopped it.

    TARGET.partial/journal   what is being made; below, a line each time more of it is safely on disk
    TARGET.partial/made/     becomes TARGET when all of it is there
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
from ..faults import usable
from .links import resolved

JOURNAL, MADE = "journal", "made"


class Unfinished:
    """made: the folder to write into. done: how many steps were recorded; None where nothing was begun."""

    def __init__(self, target: Path, journal, done: int | None):
        self.made = partial_folder(target) / MADE
        self.done = done
        self._target, self._journal = target, journal

    def place(self, path: Path) -> Path:
        """Where a file of the folder goes; the folders around it are made. Raises ValueError where that lies, with
        links resolved, outside of it."""
        place = self.made / path
        if not resolved(place).is_relative_to(resolved(self.made)):
            raise ValueError(f"{path} does not lie in {self.made}, where all of it is to be. Nothing was written.")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def record(self, done: int) -> None:
        """To be called when what was done is on disk."""
        self._journal.write(f"{done}\n".encode())
        os.fsync(self._journal.fileno())
        self.done = done

    def finish(self) -> None:
        """Gives the folder its name. All its files must be on disk."""
        for folder in (*(path for path in self.made.rglob("*") if path.is_dir()), self.made):
            sync(folder)
        self.made.rename(self._target)
        sync(self._target.parent)
        self.clear()

    @property
    def is_finished(self) -> bool:
        """Whether it was stopped when only clearing up was left to do."""
        return self._target.exists()

    def clear(self) -> None:
        shutil.rmtree(partial_folder(self._target))


def partial_folder(target: Path) -> Path:
    return target.parent / f"{target.name}.partial"


@contextmanager
def unfinished(target: Path, identity: dict[str, object]) -> Iterator[Unfinished]:
    """Begins to make `target`, or goes on with it. What ends before anything is made leaves nothing.

    identity: what it is made of, by the words that a refusal names it with. Raises ValueError where `target` is there,
    or was begun of something else, or another process is making it.
    """
    folder = partial_folder(target)
    _check_free(target, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("a+b", buffering=0) as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is writing {folder}. Wait for it, or name another target.") from None
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
    """Raises ValueError where `target` is there, or what is in the way of it."""
    _check_free(target, partial_folder(target))


def _check_free(target: Path, folder: Path) -> None:
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{target} is a link to {os.readlink(target)}, which is not there. Name another target.")
    if target.exists() and not (folder / JOURNAL).exists():
        raise ValueError(f"{target} exists. Name another target, or move it away.")
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to {os.readlink(folder)}. Delete it, or name another target.")
    if folder.exists() and not (folder / JOURNAL).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is in the way, and not of a conversion. Move it away, or name another target.")


def _done(target: Path, journal, identity: dict[str, object]) -> int | None:
    """How many steps are recorded; None: nothing that counts is there, whatever it was begun of."""
    journal.seek(0)
    lines = journal.read().split(b"\n")[:-1]  # behind the last line end: nothing, or a line that was cut off
    made = (partial_folder(target) / MADE).exists()
    if target.exists() and (len(lines) < 2 or made):
        raise ValueError(f"{target} came from elsewhere meanwhile. Move it away, or name another target.")
    if len(lines) < 2 or not (target.exists() or made):
        return None
    with usable(Path(journal.name), "what was begun there"):
        begun, done = dict(parse_json(lines[0])), int(lines[-1])
    _check_same(partial_folder(target), begun, json.loads(json.dumps(identity)))
    journal.truncate(sum(len(line) + 1 for line in lines))
    return done


def _check_same(folder: Path, begun: dict, asked: dict) -> None:
    """Raises ValueError that says what differs."""
    told = []
    for key, value in asked.items():
        if begun.get(key) != value:
            told.append(f"{key} changed" if isinstance(value, list) else f"{key} was {begun.get(key)}, is {value}")
    if told:
        raise ValueError(
            f"{folder} was begun otherwise: {'; '.join(told)}. To go on, give what it was begun with. To start over, "
            "delete it, or name another target."
        )


def sync(path: Path) -> None:
    """Has the disk take what was written to a file, or which files a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
