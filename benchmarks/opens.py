"""Records which files are opened by any process, from the kernel (inotify), not from the program under test."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Iterable

IN_OPEN = 0x20  # sys/inotify.h
EVENT = struct.Struct("iIII")  # struct inotify_event without a name, which events of a watched file lack


class Opened:
    """Records which of `files` are opened by any process inside its `with` block. Raises ValueError for no file."""

    def __init__(self, files: Iterable[Path]):
        self._watched = list(files)
        if not self._watched:
            raise ValueError("There is no file to watch.")
        self._names: dict[int, Path] = {}
        self._found: list[Path] = []

    def __enter__(self) -> Opened:
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for file in self._watched:
            watch = libc.inotify_add_watch(self._inotify, os.fsencode(file), IN_OPEN)
            if watch < 0:
                raise OSError(ctypes.get_errno(), "cannot watch", str(file))
            self._names[watch] = Path(file)
        return self

    def __exit__(self, *_) -> None:
        while True:
            try:
                data = os.read(self._inotify, 1 << 16)
            except BlockingIOError:
                break
            self._found += [self._names[watch] for watch, *_ in EVENT.iter_unpack(data)]
        os.close(self._inotify)

    def files(self) -> list[Path]:
        """The opened files in order; call it after the block. Consecutive opens of the same file may be merged, so an
        empty list is exact, and others are a lower bound."""
        return self._found
