"""Downloads one file: continued where an earlier run ended, checked by its hash, and named only when it is complete.

Until then the file is NAME.HASH.partial, next to its place. HASH are the first digits of the published hash, so that
bytes of another version, or of an untrue one, are never continued; either hub may continue what the other one began.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ...errors import coded_error
from .hub import ConnectionLost, Hub, Remote

RECEIVED = 2**20  # bytes at a time
ATTEMPTS, PAUSE_S = 5, 1.0  # in a row without a byte; the pause doubles
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def partial_file(target: Path, remote: Remote) -> Path:
    return target.with_name(f"{target.name}.{remote.sha256[:12]}.partial")


def bytes_there(target: Path, remote: Remote) -> int:
    """Of an earlier download that did not end."""
    partial = partial_file(target, remote)
    return min(partial.stat().st_size, remote.size) if partial.is_file() else 0


def sha256_of(file: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(RECEIVED):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def fetch_file(hub: Hub, remote: Remote, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Downloads a file to `target`, which must not exist. on_bytes: called with the number of bytes that are there at
    each moment. Raises ValueError, and OSError for the disk."""
    partial = partial_file(target, remote)
    with partial.open("a+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another command is downloading {target.name}. Wait until it has finished.") from None
        try:
            digest = _Download(hub, remote, out, on_bytes).run()
            os.fsync(out.fileno())
        except OSError as error:
            raise _as_full(error, target) from error
        if digest != remote.sha256:
            partial.unlink()
            raise coded_error(
                "AV-1804",
                f"{target.name} is not the file that {hub.title} publishes: the SHA-256 is {digest}, not "
                f"{remote.sha256}. It was deleted. Run the command again, or use another mirror.",
            )
        os.replace(partial, target)


def _as_full(error: OSError, target: Path) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return coded_error("AV-1316", f"The disk of {target.parent} is full. Make room, and run the command again: it "
                                  "goes on where it ended.")  # fmt: skip


class _Download:
    """The bytes of a remote file, written to an open one."""

    def __init__(self, hub: Hub, remote: Remote, out: BinaryIO, on_bytes: Callable[[int], None]):
        self.hub, self.remote, self.out, self.on_bytes = hub, remote, out, on_bytes
        self.done, self.digest = 0, hashlib.sha256()

    def run(self) -> str:
        """The hash of all bytes."""
        self._read_what_is_there()
        failures = 0
        while self.done < self.remote.size:
            before = self.done
            try:
                self._receive()
            except ConnectionLost as lost:
                failures = 1 if self.done > before else failures + 1
                if failures == ATTEMPTS:
                    raise lost.args[0] from None
                time.sleep(PAUSE_S * 2 ** (failures - 1))
        self.out.flush()
        return self.digest.hexdigest()

    def _read_what_is_there(self) -> None:
        self.out.seek(0)
        while block := self.out.read(min(RECEIVED, self.remote.size - self.done)):
            self._count(block)
        self.out.truncate(self.done)

    def _receive(self) -> None:
        """One answer of the server, as far as it goes."""
        asked = {"Range": f"bytes={self.done}-"} if self.done else {}
        with self.hub.answer("GET", self.remote.url, self.remote.file, headers=asked) as answer:
            if self.done and answer.status_code == 200:  # a server that sends whole files only
                self.done, self.digest = 0, hashlib.sha256()
                self.out.truncate(0)
            elif self.done:
                self._require_rest(answer.headers.get("Content-Range", ""))
            for block in answer.raw.stream(RECEIVED, decode_content=False):
                if self.done + len(block) > self.remote.size:
                    raise self._untrue(f"more than the {self.remote.size} bytes that it announced")
                self.out.write(block)
                self._count(block)
        self.out.flush()
        if self.done < self.remote.size:
            raise ConnectionLost(self.hub.unreachable(self.remote.file, f"it ended after {self.done} bytes"))

    def _require_rest(self, sent: str) -> None:
        found = RANGE.fullmatch(sent)
        if found is None or (int(found[1]), int(found[3])) != (self.done, self.remote.size):
            raise self._untrue(f"{sent[:60]!r} instead of the bytes from {self.done} of {self.remote.size}")

    def _untrue(self, what: str) -> ValueError:
        return coded_error("AV-1805", f"{self.hub.title} ({self.hub.shown}) sends {what} of {self.remote.file.name}. "
                                      "Use another mirror.")  # fmt: skip

    def _count(self, block: bytes) -> None:
        self.digest.update(block)
        self.done += len(block)
        self.on_bytes(self.done)
