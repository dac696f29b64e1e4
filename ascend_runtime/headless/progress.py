"""How far the command is: a bar with the job's prompt, node and step on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import io
import sys
import time

from tqdm import tqdm

from .jobs import Job
from .screen import fit, line, say

EVERY_S = 10.0  # between two lines where these cannot be written over one another


class Progress:
    """Of `count` jobs, on a stream, by default stderr; a context manager. Without a terminal it is a line for the first
    step of each node, one every ten seconds, and a last one."""

    def __init__(self, count: int, stream=None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        shape = {"file": self._stream} if self._terminal else {"file": io.StringIO(), "ncols": 0, "mininterval": 1e9}
        self._bar = tqdm(total=count, unit="job", desc="queue", **shape)
        self._job: Job | None = None
        self._node: str | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_):
        if not self._terminal:
            self._say()
        self._bar.close()

    def skip(self) -> None:
        """A job is done already; it took no time of this run's."""
        self._bar.initial += 1
        self._bar.update()

    def begin(self, job: Job) -> None:
        self._job, self._node = job, None
        self._show(line(job.prompt, 30))

    def on_step(self, node: str, step: int, steps: int) -> None:
        kind = self._job.graph.get(node, {}).get("class_type", node)
        self._show(f"{line(kind, 60)} {line(step, 20)}/{line(steps, 20)}", now=node != self._node)
        self._node = node

    def on_wait(self, how: str) -> None:
        self._show(f"{line(self._job.prompt, 30)}: {how}")

    def end(self) -> None:
        self._bar.update()

    def _show(self, text: str, now: bool = False) -> None:
        self._bar.set_postfix_str(fit(text, self._stream), refresh=self._terminal)
        if not self._terminal and (now or time.monotonic() - self._shown > EVERY_S):
            self._say()

    def _say(self) -> None:
        self._shown = time.monotonic()
        say(str(self._bar), self._stream)
