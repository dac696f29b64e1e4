"""How far the command is: a bar with the job's prompt, node and step."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .jobs import Job
from .screen import fit, line

SELDOM_S = 10.0  # between two lines about a job that waits, where they cannot be written over one another


class Progress:
    """A bar over `count` jobs, on a stream, by default stderr; a context manager."""

    def __init__(self, count: int, stream=None):
        self._stream = stream or sys.stderr
        self._bar = tqdm(total=count, unit="job", desc="queue", file=self._stream)
        self._job: Job | None = None
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_):
        self._bar.close()

    def skip(self) -> None:
        """A job is done already; it took no time of this run's."""
        self._bar.initial += 1
        self._bar.update()

    def begin(self, job: Job) -> None:
        self._job = job
        self._show(line(job.prompt, 30))

    def on_step(self, node: str, step: int, steps: int) -> None:
        kind = self._job.graph.get(node, {}).get("class_type", node)
        self._show(f"{line(kind, 60)} {line(step, 20)}/{line(steps, 20)}")

    def on_wait(self, how: str) -> None:
        if self._stream.isatty() or time.monotonic() - self._shown > SELDOM_S:
            self._show(f"{line(self._job.prompt, 30)}: {how}")

    def end(self) -> None:
        self._bar.update()

    def _show(self, text: str) -> None:
        self._shown = time.monotonic()
        self._bar.set_postfix_str(fit(text, self._stream))
