"""How often files are opened, by any process: the kernel tells it (inotify), not the program under test."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Iterable

IN_OPEN = 0x20  # sys/inotify.h
EVENT = struct.Struct("iIII")  # struct inotify_event without its name, which a watched file has not


class OpenCounter:
    """Counts the openings of `files` from its `with` on."""

    def __init__(self, files: Iterable[Path]):
        self._files = list(files)
        if not self._files:
            raise ValueError("There is no file to watch.")

    def __enter__(self) -> OpenCounter:
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for file in self._files:
            if libc.inotify_add_watch(self._inotify, os.fsencode(file), IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), "cannot watch", str(file))
        return self

    def count(self) -> int:
        """Openings since the last call. Like ones in a row are one event: 0 is exact, more is a lower bound."""
        events = 0
        while True:
            try:
                events += len(os.read(self._inotify, 1 << 16)) // EVENT.size
            except BlockingIOError:
                return events

    def __exit__(self, *_) -> None:
        os.close(self._inotify)
