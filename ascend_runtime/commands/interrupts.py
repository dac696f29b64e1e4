"""Handles Ctrl+C, `kill` and a closed terminal alike: the command stops and cleans up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context manager in which these signals raise KeyboardInterrupt in the main thread. An ignored SIGHUP, as with
    nohup, stays ignored. An ignored SIGINT does not, as some shells ignore it for background processes."""

    def __init__(self):
        self._held, self._received, self._before = False, False, {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, *_):
        self._received = True
        if not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delays an interrupt until the end of this context."""
        self._held, self._received = True, False
        try:
            yield
        finally:
            self._held = False
        if self._received:
            raise KeyboardInterrupt
