"""The results file: one line for every finished job, safe against full disks and power cuts."""

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
from .screen import one_line
from .typed import NotUnderstood, decode_json

SUCCESS = "success"
BEGINNING = b'{"key": "'  # the first bytes of every record
MAX_RECORD_BYTES = 64 << 20  # bytes
OUTCOME = 64 << 10  # bytes reserved for the fields that are known after the job; usually some hundred
FULL = (errno.ENOSPC, errno.EDQUOT)


class LoggedJob(Struct, omit_defaults=True):
    """The outcome of a job. seconds: measured by ComfyUI. files: relative to its output folder."""

    key: str
    prompt: str
    seed: int | None
    image: str | None
    status: str
    seconds: float | None = None
    files: list[str] | None = None
    error: str | None = None


class Results:
    """The last record of every job by key, in memory and, if a path is given, in a file.

    The constructor raises QueueError if the file cannot be written, or contains other lines. warn: called if the file
    was repaired.
    """

    def __init__(self, path: Path | None, warn: Callable[[str], None]):
        self._path, self._room = path, None
        self.records: dict[str, LoggedJob] = {}
        if path:
            with self._failures("write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(path) as file:
                    self._read(file, warn)

    def done(self, key: str) -> bool:
        return key in self.records and self.records[key].status == SUCCESS

    def reserve(self, record: LoggedJob) -> None:
        """Reserves disk space for a job's record before it runs, in an unnamed file next to the results. Raises
        QueueError if the disk is full."""
        if self._path is None:
            return
        size = len(_encoded(record)) + OUTCOME
        if not self._room or os.fstat(self._room.fileno()).st_size < size:
            with self._failures("keep room for"):
                self._room = _room(self._path.parent, size)

    def add(self, record: LoggedJob) -> None:
        """Adds a record and syncs it to disk. Raises QueueError that contains the record if it cannot be written."""
        self.records[record.key] = record
        if not self._path:
            return
        try:
            self._append(_encoded(record))
        except OSError as error:
            raise QueueError(f"Cannot write --results {self._path}: {error.strerror}. A job has finished: free some "
                             "space, and add this line to the file, or the job will run again.\n"
                             f"{json.dumps(to_builtins(record))}") from None

    def _append(self, content: bytes) -> None:
        try:
            _append(self._path, content)
        except OSError as error:
            if error.errno not in FULL or not self._room:
                raise
            self._room.close()  # frees the reserved space
            self._room = None
            _append(self._path, content)

    def _read(self, file: BinaryIO, warn: Callable[[str], None]) -> None:
        whole = 0  # bytes of complete lines
        while content := file.readline(MAX_RECORD_BYTES):
            if not content.endswith(b"\n"):
                self._mend(file, whole, content, warn)
            elif content.strip():
                self._take(content)
            whole += len(content)

    def _take(self, content: bytes) -> None:
        try:
            record = decode_json(content, LoggedJob)
        except NotUnderstood:
            raise QueueError(f"--results {self._path} has a line that is not a record of this command: "
                             f"'{one_line(content[:200].decode(errors='replace'), 80)}'. Remove the line, or give "
                             "another file.") from None
        self.records[record.key] = record

    def _mend(self, file: BinaryIO, whole: int, content: bytes, warn: Callable[[str], None]) -> None:
        """Repairs a last line that was cut by a full disk or a power cut: adds a missing line end, or removes the line.
        A line that is not a record is not changed, and raises QueueError."""
        rest = content.rstrip(b" \t\r\n\0")
        try:
            self._take(rest)
            os.ftruncate(file.fileno(), whole + len(rest))
            os.write(file.fileno(), b"\n")
        except QueueError:
            ours = rest.startswith(BEGINNING) or BEGINNING.startswith(rest)
            if not ours or len(content) == MAX_RECORD_BYTES:
                raise
            os.ftruncate(file.fileno(), whole)
            os.fsync(file.fileno())
            warn(f"warning: the last line of --results {self._path} was incomplete and has been removed; if this "
                 "command includes its job, it runs again.")

    @contextmanager
    def _failures(self, do: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QueueError(f"Cannot {do} --results {self._path}: {error.strerror}. Free some space, or give another "
                             "file.") from None


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Opens the file for reading and appending, and creates it if necessary. Locks it against other commands, if the
    file system supports that."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks; then only one command may write
            pass
        yield file


def _append(path: Path, content: bytes) -> None:
    """Appends a complete line, or nothing. Raises OSError."""
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


def _encoded(record: LoggedJob) -> bytes:
    """The record as a line of JSON, without escapes except for lone surrogates."""
    return (json.dumps(to_builtins(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _room(folder: Path, size: int) -> BinaryIO | None:
    """An unnamed file of `size` bytes; None without permission to create files."""
    try:
        room = tempfile.TemporaryFile(dir=folder, buffering=0)
    except PermissionError:
        return None
    left = memoryview(os.urandom(size))  # random, as a file system may compress
    while left:
        left = left[room.write(left):]
    os.fsync(room.fileno())
    return room
