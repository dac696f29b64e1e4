"""The results file: a record a line for every job that ended, kept through full disks and power cuts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct, to_builtins

from . import QueueError
from .screen import line
from .typed import NotUnderstood, decode

SUCCESS = "success"
BEGINNING = b'{"key": "'  # of every record
LONGEST_LINE = 64 << 20  # bytes
OUTCOME = 64 << 10  # bytes, of what a record says of a job's end; usually some hundred
FULL = (errno.ENOSPC, errno.EDQUOT)


class Record(Struct, omit_defaults=True):
    """How a job ended. seconds: as ComfyUI counted them. files: relative to its output folder."""

    key: str
    prompt: str
    seed: int | None
    image: str | None
    status: str
    seconds: float | None = None
    files: list[str] | None = None
    error: str | None = None


class Results:
    """The last record of every job, by key, in memory and, if there is a path, in a file.

    Raises QueueError if the file cannot be made or written, before any work is done, or has lines of something else.
    warn: called with what was mended in the file.
    """

    def __init__(self, path: Path | None, warn: Callable[[str], None]):
        self._path, self._room = path, None
        self.records: dict[str, Record] = {}
        if path:
            with self._failures("write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(path) as file:
                    self._read(file, warn)

    def done(self, key: str) -> bool:
        return key in self.records and self.records[key].status == SUCCESS

    def reserve(self, record: Record) -> None:
        """Takes room on the disk for a job's record before the job runs, in an invisible file next to the results.
        Raises QueueError if there is none."""
        if self._path is None:
            return
        size = len(_encoded(record)) + OUTCOME
        if not self._room or os.fstat(self._room.fileno()).st_size < size:
            with self._failures("keep room for"):
                self._room = _room(self._path.parent, size)

    def add(self, record: Record) -> None:
        """Adds a record, which is on the disk afterwards. Raises QueueError with the record if it cannot be written."""
        self.records[record.key] = record
        if not self._path:
            return
        try:
            self._append(_encoded(record))
        except OSError as error:
            raise QueueError(f"Cannot write --results {self._path}: {error.strerror}. A job has ended all the same: "
                             "make room, and add this line to the file, or its job will run again.\n"
                             f"{json.dumps(to_builtins(record))}") from None

    def _append(self, content: bytes) -> None:
        try:
            _append(self._path, content)
        except OSError as error:
            if error.errno not in FULL or not self._room:
                raise
            self._room.close()  # what was kept for this
            self._room = None
            _append(self._path, content)

    def _read(self, file: BinaryIO, warn: Callable[[str], None]) -> None:
        whole = 0  # bytes that end with a line's end
        while content := file.readline(LONGEST_LINE):
            if not content.endswith(b"\n"):
                self._mend(file, whole, content, warn)
            elif content.strip():
                self._take(content)
            whole += len(content)

    def _take(self, content: bytes) -> None:
        try:
            record = decode(content, Record)
        except NotUnderstood:
            raise QueueError(f"--results {self._path} has a line that is no record of this command: "
                             f"'{line(content[:200].decode(errors='replace'), 80)}'. Remove the line, or name another "
                             "file.") from None
        self.records[record.key] = record

    def _mend(self, file: BinaryIO, whole: int, content: bytes, warn: Callable[[str], None]) -> None:
        """The last line was cut while it was written, by a full disk or the end of power: only its end is missing, or
        it goes. A line of something else stays and is refused."""
        rest = content.rstrip(b" \t\r\n\0")
        try:
            self._take(rest)
            os.ftruncate(file.fileno(), whole + len(rest))
            os.write(file.fileno(), b"\n")
        except QueueError:
            ours = rest.startswith(BEGINNING) or BEGINNING.startswith(rest)
            if not ours or len(content) == LONGEST_LINE:
                raise
            os.ftruncate(file.fileno(), whole)
            os.fsync(file.fileno())
            warn(f"warning: the last line of --results {self._path} was cut off, and is removed; if its job is among "
                 "those of this command, it runs again.")

    @contextmanager
    def _failures(self, do: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QueueError(f"Cannot {do} --results {self._path}: {error.strerror}. Make room, or name another "
                             "file.") from None


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made if need be, at its beginning; what is written goes to its end. Other commands that write to it
    wait, where the file system has locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some file systems of networks have none: then only one command may write
            pass
        yield file


def _append(path: Path, content: bytes) -> None:
    """Adds a line whole, or not at all. Raises OSError."""
    with _locked(path) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(file.fileno(), left):]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def _encoded(record: Record) -> bytes:
    """A line of JSON that people can read; half a surrogate pair becomes an escape, which is JSON too."""
    return (json.dumps(to_builtins(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _room(folder: Path, size: int) -> BinaryIO | None:
    """A file of `size` bytes without a name; None where no other file may be made."""
    try:
        room = tempfile.TemporaryFile(dir=folder, buffering=0)
    except PermissionError:
        return None
    left = memoryview(os.urandom(size))  # which no file system compresses
    while left:
        left = left[room.write(left):]
    os.fsync(room.fileno())
    return room
