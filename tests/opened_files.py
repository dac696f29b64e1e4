"""Which files any process opens: the kernel's word (inotify), not that of the program under test."""

import ctypes
import os
import struct
from pathlib import Path

IN_OPEN = 0x20  # sys/inotify.h
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Opened:
    """Notes which of `files` are opened, by whomever, inside its `with` block."""

    def __init__(self, files):
        self._watched = list(files)
        assert self._watched, "no file to watch"

    def __enter__(self):
        self._inotify = _libc.inotify_init1(os.O_NONBLOCK)
        self._names = {}
        for file in self._watched:
            watch = _libc.inotify_add_watch(self._inotify, os.fsencode(file), IN_OPEN)
            if watch < 0:
                raise OSError(ctypes.get_errno(), f"inotify_add_watch({file})")
            self._names[watch] = Path(file)
        return self

    def __exit__(self, *_):
        self._found = list(self._events())
        os.close(self._inotify)

    def files(self) -> list[Path]:
        """The opened files in order, where one in a row counts once; to be asked after the block."""
        return self._found

    def _events(self):
        while True:
            try:
                data = os.read(self._inotify, 65536)
            except BlockingIOError:
                return
            while data:
                watch, _, _, length = _EVENT.unpack_from(data)
                data = data[_EVENT.size + length :]
                yield self._names[watch]
